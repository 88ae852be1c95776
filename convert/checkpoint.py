"""Stable Diffusion models as files: one checkpoint, or a Diffusers folder; read by mapping, written by streaming."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path

import torch
from safetensors import safe_open

from .checkpoint_names import Place, architecture_of_file, places_in_component, places_in_file
from .errors import AdapterError
from .files import beside, read_tensors
from .folder_files import INDEX, is_weights, other_entries, pipeline_files, variant_of
from .names import COMPONENTS, ModuleName
from .parsing import json_value
from .weights_writing import Planned, write

Change = Callable[[torch.Tensor], torch.Tensor]  # a module's weight -> the new one in float32, same shape


@dataclass(frozen=True)
class WeightsFile:
    """One file of a model: its tensors (mapped, not read), and where the modules' weights are among them."""

    path: Path
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    metadata: Mapping[str, str]
    places: Mapping[ModuleName, Place] = field(repr=False)

    def write(
        self,
        target: Path,
        changes: Mapping[ModuleName, Change],
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        replaces: bool | None = None,
    ) -> None:
        """Write it with the modules' weights changed; all other tensors stay as they are unless dtype is given.

        replaces: see `weights_writing.write`.
        """
        write(target, self.planned(changes, dtype), metadata, self.path.suffix != ".bin", replaces)

    def planned(self, changes: Mapping[ModuleName, Change], dtype: torch.dtype | None) -> dict[str, Planned]:
        """Its tensors as `write` would write them, each made only when its turn comes."""
        by_key: dict[str, list[tuple[Place, Change, ModuleName]]] = {}
        for module, place in self.places.items():
            if module in changes:
                by_key.setdefault(place.key, []).append((place, changes[module], module))
        planned = {}
        for key, tensor in self.tensors.items():
            to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            if key in by_key:
                planned[key] = Planned(to, tuple(tensor.shape), _changed(tensor, by_key[key], to))
            elif to != tensor.dtype:
                planned[key] = Planned(to, tuple(tensor.shape), bound(tensor.to, to))
            else:
                planned[key] = Planned.copy(tensor)
        return planned


def _changed(
    tensor: torch.Tensor, changes: list[tuple[Place, Change, ModuleName]], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    module = changes[0][2]
    if not tensor.is_floating_point():
        raise AdapterError(f"{module} is {tensor.dtype} in the model: a quantised weight cannot be changed")

    def make() -> torch.Tensor:
        value = tensor.to(torch.float32, copy=True)
        for place, change, _ in changes:
            part = place.of(value)
            new = change(part)
            if new.data_ptr() != part.data_ptr():
                part.copy_(new)
        lowest, highest = (float(end) for end in value.aminmax())  # one pass; NaN comes through
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise AdapterError(f"{module}: the changed weight has NaN or infinite numbers")
        if max(-lowest, highest) > torch.finfo(dtype).max:
            raise AdapterError(f"{module}: the changed weight is too large for {dtype}; choose another precision")
        return value.to(dtype)

    return make


@dataclass(frozen=True)
class Checkpoint:
    """A Stable Diffusion model on disk. `architecture` is "sd" or "sdxl"."""

    path: Path
    architecture: str
    files: tuple[WeightsFile, ...] = field(repr=False)

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """Open a checkpoint file (.safetensors, .ckpt) or a Diffusers folder.

        AdapterError where it is missing, broken, or holds no U-Net of SD1.x, SD2.x or SDXL.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            return cls._open_folder(path)
        tensors, metadata = read_tensors(path)
        architecture = architecture_of_file(tensors)
        if architecture is None:
            raise AdapterError(f"{path} is no Stable Diffusion checkpoint: it has no model.diffusion_model tensors")
        places = places_in_file(tensors, architecture)
        return cls(path, architecture, (WeightsFile(path, tensors, metadata, places),))

    @classmethod
    def _open_folder(cls, path: Path) -> "Checkpoint":
        if not (path / "unet").is_dir():
            raise AdapterError(f"{path} is no Diffusers folder of Stable Diffusion: it has no folder unet")
        listed = {component: weights_of(path / component) for component in COMPONENTS if (path / component).is_dir()}
        if not listed["unet"]:
            raise AdapterError(f"{path / 'unet'} holds no weights (.safetensors or .bin)")
        opened = [(component, file, *read_tensors(file)) for component, files in listed.items() for file in files]
        extra = any(key.startswith("add_embedding.") for component, _, tensors, _ in opened for key in tensors)
        architecture = "sdxl" if extra or "text_encoder_2" in listed else "sd"
        files = tuple(
            WeightsFile(file, tensors, metadata, places_in_component(tensors, component, architecture))
            for component, file, tensors, metadata in opened
        )
        return cls(path, architecture, files)

    @property
    def is_folder(self) -> bool:
        """Whether it is a Diffusers folder."""
        return self.path.is_dir()

    @property
    def modules(self) -> dict[ModuleName, WeightsFile]:
        """All modules that an adapter can have here, with the file of each."""
        return {module: file for file in reversed(self.files) for module in file.places}

    def weight(self, module: ModuleName, file: WeightsFile | None = None) -> torch.Tensor:
        """The weight of a module as it is in the file: mapped, of its own dtype."""
        file = file or self.modules[module]
        place = file.places[module]
        return place.of(file.tensors[place.key])

    def read(self, module: ModuleName, file: WeightsFile) -> torch.Tensor:
        """As `weight`, mapped for this tensor only: reading many does not keep the whole file resident."""
        place = file.places[module]
        if file.path.suffix != ".safetensors":
            return place.of(file.tensors[place.key])
        with safe_open(file.path, framework="pt") as opened:
            return place.of(opened.get_tensor(place.key))

    @property
    def base_version(self) -> str:
        """kohya's ss_base_model_version: sd_v1, sd_v2 or sdxl_base_v1-0, and sd_v2_v where the folder says so."""
        if self.architecture == "sdxl":
            return "sdxl_base_v1-0"
        queries = [module for module in self.modules if module.path.endswith("attn2.to_k")]
        if not queries or self.weight(queries[0]).shape[1] != 1024:  # the width of SD2's text encoder
            return "sd_v1"
        try:
            scheduler = json_value((self.path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            scheduler = {}
        if not isinstance(scheduler, dict):
            scheduler = {}
        return "sd_v2_v" if scheduler.get("prediction_type") == "v_prediction" else "sd_v2"

    def write(
        self,
        target: str | Path,
        changes: Mapping[ModuleName, Change],
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the model with changed weights, whole or not at all: a file as a file, a folder as a folder.

        changes: for some modules, what makes a new weight of the old (float32, same shape, in place or not). The result
        has the old dtype, or `dtype`, which then holds for all floating point tensors. metadata: entries to add; None
        leaves out the source's too.
        """
        target = Path(target).expanduser()
        if not self.is_folder:
            (file,) = self.files
            facts = {} if metadata is None else {**file.metadata, **metadata}
            facts.pop("modelspec.hash_sha256", None)
            file.write(target, changes, dtype, facts)
            return target
        touched = {file.path: file for file in self.files if dtype is not None or file.places.keys() & changes.keys()}
        with _replacing_folder(target) as partial:
            for source in pipeline_files(self.path):
                copy = partial / source.relative_to(self.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                if source in touched:
                    file = touched[source]
                    facts = dict(file.metadata) if metadata is None else {**file.metadata, **metadata}
                    file.write(copy, changes, dtype, facts, target.exists())
                    before = target / source.relative_to(self.path)
                    if before.exists():  # who may read it stays as it was
                        copy.chmod(before.stat().st_mode)
                else:
                    shutil.copy2(source, copy)
        return target


def weights_of(folder: Path) -> list[Path]:
    """The weights files of a component, .bin only of variants without .safetensors; those of no variant first."""
    found = [file for file in folder.glob("*.safetensors") if is_weights(file.name)]
    safe = {variant_of(file) for file in found}
    found += [file for file in folder.glob("*.bin") if is_weights(file.name) and variant_of(file) not in safe]
    return sorted(found, key=lambda file: (file.name.count("."), file.name))


@contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to fill; takes its place when the block ends well, removed when it does not.

    What is in the old one and no part of a model moves to the new one.
    """
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{target} is a file: a Diffusers folder is written as a folder")
    target = target.resolve()  # a link stays one
    there = target.is_dir() and any(target.iterdir())
    if there and not (target / INDEX).is_file() and not weights_of(target / "unet"):
        raise AdapterError(f"{target} is a folder of something else: name a new one, or one of a Diffusers model")
    others: list[Path] = []
    partial, old = (beside(target, kind) for kind in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
        if there:
            partial.chmod(target.stat().st_mode)
        yield partial
        others = [name for name in other_entries(target) if not (partial / name).exists()]
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        for name in others:
            (target / name).parent.mkdir(exist_ok=True)
            (old / name).rename(target / name)
    except OSError as error:
        raise AdapterError(f"{target} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists() and not any((old / name).exists() for name in others):
            shutil.rmtree(old, ignore_errors=True)
