"""Base models on disk: a single checkpoint file or a Diffusers folder, memory-mapped for reading, streamed to write."""

import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from functools import partial as bound
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lora_adapters.convert.errors import AdapterError, first_line
from lora_adapters.convert.families.checkpoint_names import (
    family_of_file,
    family_of_folder,
    other_slices_in_component,
    other_slices_in_file,
    slices_in_component,
    slices_in_file,
)
from lora_adapters.convert.families.family import ModelFamily, Version
from lora_adapters.convert.families.names import COMPONENTS, ModuleName
from lora_adapters.convert.families.registry import denoisers, titles
from lora_adapters.convert.families.tensor_slice import TensorSlice
from lora_adapters.convert.parsing import json_value

from .atomic import replacing_folder
from .changed_weights import Change, Requantised, cast, changed, unscaled
from .files import read_tensors, read_text
from .folder_files import INDEX, other_entries, pipeline_files
from .folder_weights import variant, weights_of
from .scaled_weights import Neighbours, dequantised, neighbours, refuse, without_scales
from .weights_writing import Planned, write


@dataclass(frozen=True)
class WeightsFile:
    """One file of a model, with memory-mapped tensors.

    `places` maps modules to the slices of tensors that are their weights; `others` does the same for normalisation
    layers and for biases (named by `names.bias_of`). `shards` has the tensors of the other files of the same variant.
    """

    path: Path
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    metadata: Mapping[str, str]
    places: Mapping[ModuleName, TensorSlice] = field(repr=False)
    shards: tuple[Mapping[str, torch.Tensor], ...] = field(default=(), repr=False)
    others: Mapping[ModuleName, TensorSlice] = field(default_factory=dict, repr=False)

    def slice_of(self, module: ModuleName) -> TensorSlice:
        """The slice that is the weight of a module, or a bias."""
        return self.places[module] if module in self.places else self.others[module]

    @cached_property
    def neighbours(self) -> Neighbours:
        """The scales, and other tensors that change the meaning of weights."""
        own = neighbours(self.tensors)
        if not self.shards:
            return own
        every = neighbours(ChainMap(dict(self.tensors), *map(dict, self.shards)))
        apart = {key: (scale, "scaled") for key, scale in every.scales.items() if own.scales.get(key) != scale}
        return own._replace(foreign={**apart, **every.foreign})

    @cached_property
    def _scale_keys(self) -> frozenset[str]:
        return frozenset(self.neighbours.scales.values())

    def is_changed_by(self, changes: Mapping[ModuleName, Change]) -> bool:
        """Whether one of these changes applies to a tensor in this file."""
        return any(module in self.places or module in self.others for module in changes)

    def check(self, module: ModuleName) -> None:
        """Raise AdapterError if a module's weight is quantised in an unsupported way."""
        key = self.slice_of(module).key
        refuse(self.neighbours.foreign, [key], str(self.path))
        if not self.tensors[key].is_floating_point():
            raise AdapterError(
                f"{self.path}: {key} is {self.tensors[key].dtype}: quantised weights are not supported; use the model "
                "in fp16 or bf16"
            )

    def write(
        self,
        target: Path,
        changes: Mapping[ModuleName, Change],
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        replaces: bool | None = None,
    ) -> None:
        """Write this file with changed weights, as `weights_writing.write` does.

        Args:
            target: The file to write.
            changes: For each module to change, the function that computes the new weight.
            dtype: The dtype of all floating point tensors; None keeps the dtype of each.
            metadata: The metadata of the new file.
            replaces: See `weights_writing.write`.

        Raises:
            AdapterError: A weight to change is not supported, or a value is too large for the dtype.
        """
        metadata = metadata if dtype is None else without_scales(metadata)
        write(target, self.planned(changes, dtype), metadata, self.path.suffix != ".bin", replaces)

    def planned(self, changes: Mapping[ModuleName, Change], dtype: torch.dtype | None) -> dict[str, Planned]:
        """The tensors that `write` would write, each computed on demand."""
        by_key: dict[str, list[tuple[TensorSlice, Change, ModuleName]]] = {}
        for module, place in (*self.places.items(), *self.others.items()):
            if module in changes:
                self.check(module)
                by_key.setdefault(place.key, []).append((place, changes[module], module))
        if dtype is not None:
            refuse(self.neighbours.foreign, self.neighbours.foreign, f"{self.path} cannot be cast")
        planned: dict[str, Planned] = {}
        for key, stored in self.tensors.items():
            planned.update(self._planned(key, stored, by_key.get(key, []), dtype))
        whole = _Whole(self.path)
        return {key: tensor._replace(make=bound(whole.checked, tensor.make)) for key, tensor in planned.items()}

    def _planned(
        self,
        key: str,
        tensor: torch.Tensor,
        changes: list[tuple[TensorSlice, Change, ModuleName]],
        dtype: torch.dtype | None,
    ) -> dict[str, Planned]:
        """Plan one tensor; a scaled weight is planned together with its scale, so that scales alone give nothing."""
        scales = self.neighbours.scales
        if key in self._scale_keys or (dtype is not None and key in self.neighbours.extras):
            return {}  # planned with its weight, or no longer needed
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        shape = tuple(tensor.shape)
        if key not in scales:
            if changes:
                return {key: Planned(to, shape, changed(tensor.to, changes, to))}
            return {
                key: Planned(to, shape, bound(cast, key, tensor, to)) if to != tensor.dtype else Planned.copy(tensor)
            }
        scale_key, scale = scales[key], self.tensors[scales[key]]
        value = bound(unscaled, tensor, scale, scale_key)
        if dtype is not None:
            make = changed(value, changes, to) if changes else lambda: cast(key, value(), to)
            return {key: Planned(to, shape, make)}
        if not changes:
            return {key: Planned.copy(tensor), scale_key: Planned.copy(scale)}
        both = Requantised(changed(value, changes, torch.float32), tensor.dtype, scale, scale_key)
        return {
            key: Planned(to, shape, both.weight),
            scale_key: Planned(scale.dtype, tuple(scale.shape), both.scale, late=True),
        }


class _Whole:
    """Checks that a mapped file is not truncated while it is read, which would kill the process."""

    def __init__(self, file: Path) -> None:
        self.file, self.before = file, file.stat()

    def checked(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Compute a tensor from the file; AdapterError if the file has been truncated."""
        with suppress(OSError):  # the file was renamed or deleted: the mapping stays valid
            now = self.file.stat()
            if os.path.samestat(now, self.before) and now.st_size < self.before.st_size:
                raise AdapterError(f"{self.file} was truncated while it was read")
        return make()


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk and its family."""

    path: Path
    family: ModelFamily
    files: tuple[WeightsFile, ...] = field(repr=False)

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """Open a checkpoint file (.safetensors, .ckpt) or a Diffusers folder.

        Args:
            source: The file or folder; `~` is expanded.

        Returns:
            The checkpoint. Tensors are memory-mapped and read when they are used.

        Raises:
            AdapterError: The source is missing or damaged, or has no denoiser of a known family.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            return cls._open_folder(path)
        tensors, metadata = read_tensors(path)
        family = family_of_file(tensors)
        if family is None:
            raise AdapterError(
                f"{path} is not a checkpoint of {titles('or')}: it has no tensors of a U-Net (model.diffusion_model) "
                "or of one of these transformers"
            )
        places, others = slices_in_file(tensors, family), other_slices_in_file(tensors, family)
        return cls(path, family, (WeightsFile(path, tensors, metadata, places, others=others),))

    @classmethod
    def _open_folder(cls, path: Path) -> "Checkpoint":
        denoiser = next((name for name in denoisers() if (path / name).is_dir()), None)
        if denoiser is None:
            raise AdapterError(f"{path} is not a Diffusers folder: it has no folder {' or '.join(denoisers())}")
        listed = {component: weights_of(path / component) for component in COMPONENTS if (path / component).is_dir()}
        if not listed[denoiser]:
            raise AdapterError(f"{path / denoiser} has no weights (.safetensors or .bin)")
        opened = [(component, file, *read_tensors(file)) for component, files in listed.items() for file in files]
        keys = (key for _, _, tensors, _ in opened for key in tensors)
        family = family_of_folder(listed, keys, _class_name(path / denoiser / "config.json"))
        files = tuple(
            WeightsFile(
                file,
                tensors,
                metadata,
                slices_in_component(tensors, component, family),
                tuple(other for part, shard, other, _ in opened if _same_set((part, shard), (component, file))),
                other_slices_in_component(tensors, component, family),
            )
            for component, file, tensors, metadata in opened
        )
        return cls(path, family, files)

    @property
    def architecture(self) -> str:
        """The name of the family."""
        return self.family.name

    @property
    def is_folder(self) -> bool:
        """Whether it is a Diffusers folder."""
        return self.path.is_dir()

    @property
    def modules(self) -> dict[ModuleName, WeightsFile]:
        """All modules that an adapter can change, with the file of each."""
        return {module: file for file in reversed(self.files) for module in file.places}

    @property
    def parameters(self) -> dict[ModuleName, WeightsFile]:
        """`modules` plus normalisation layers and biases (named by `names.bias_of`)."""
        return {module: file for file in reversed(self.files) for module in (*file.places, *file.others)}

    def weight(self, module: ModuleName, file: WeightsFile | None = None) -> torch.Tensor:
        """The weight of a module as stored: memory-mapped, in the dtype of the file."""
        file = file or self.parameters[module]
        place = file.slice_of(module)
        return place.of(file.tensors[place.key])

    def check_absent(self) -> None:
        """Raise AdapterError if modules seem to be missing because quantised weights have other names."""
        for file in self.files:
            foreign = file.neighbours.foreign
            refuse(foreign, (key for key in foreign if key not in file.tensors), str(file.path))

    def read(self, module: ModuleName, file: WeightsFile) -> torch.Tensor:
        """The weight of a module, as stored, or dequantised to float32 if it has a scale.

        The file is mapped for this tensor only. Otherwise, reading many tensors would keep the whole file in memory.

        Args:
            module: The module.
            file: The file that contains it; see `parameters`.

        Returns:
            The weight, (out, in) or (out, in, height, width).

        Raises:
            AdapterError: The weight is quantised in an unsupported way, or the file has changed since it was opened.
        """
        file.check(module)
        place = file.places[module]
        scale = file.neighbours.scales.get(place.key)
        if file.path.suffix != ".safetensors":
            weight = file.tensors[place.key]
        else:
            try:
                with safe_open(file.path, framework="pt") as opened:
                    weight = opened.get_tensor(place.key)
            except (SafetensorError, OSError) as error:
                raise AdapterError(f"{file.path} changed while it was read ({first_line(error)})") from None
        return place.of(weight if scale is None else dequantised(weight, file.tensors[scale], scale))

    @property
    def version(self) -> Version:
        """The version of the family, from the width of the text encoder and from the scheduler of a folder."""
        for version in self.family.versions:
            if version.mark and ModuleName(self.family.denoiser.name, version.mark) in self.modules:
                return version
        reading = next((module for module in self.modules if module.path.endswith("attn2.to_k")), None)
        width = None if reading is None else self.weight(reading).shape[1]
        try:
            scheduler = json_value(read_text(self.path / "scheduler" / "scheduler_config.json"))
        except (OSError, ValueError):
            scheduler = {}
        says_v = isinstance(scheduler, dict) and scheduler.get("prediction_type") == "v_prediction"
        return self.family.version(width, "v" if says_v else "epsilon") or self.family.versions[0]

    @property
    def base_version(self) -> str:
        """kohya's ss_base_model_version, such as sd_v1, or sd_v2_v if a folder's scheduler predicts v."""
        return self.version.value

    def write(
        self,
        target: str | Path,
        changes: Mapping[ModuleName, Change],
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the model with changed weights, atomically: a file as a file, a folder as a folder.

        Args:
            target: The file or folder to write.
            changes: For each module to change, a function from its old weight (float32) to the new one, in the same
                shape; it may work in place. The result is cast to the old dtype, or to `dtype`.
            dtype: The dtype of all floating point tensors; None keeps the dtype of each.
            metadata: Entries to add to the metadata; None also removes the metadata of the source.

        Returns:
            The path that was written.

        Raises:
            AdapterError: A weight to change is not supported, or a value is too large for the dtype.
        """
        target = Path(target).expanduser()
        if not self.is_folder:
            (file,) = self.files
            facts = {} if metadata is None else {**file.metadata, **metadata}
            facts.pop("modelspec.hash_sha256", None)
            file.write(target, changes, dtype, facts)
            return target
        touched = {file.path: file for file in self.files if dtype is not None or file.is_changed_by(changes)}
        with _replacing_folder(target) as partial:
            for source in pipeline_files(self.path):
                copy = partial / source.relative_to(self.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                if source in touched:
                    file = touched[source]
                    facts = dict(file.metadata) if metadata is None else {**file.metadata, **metadata}
                    file.write(copy, changes, dtype, facts, target.exists())
                    before = target / source.relative_to(self.path)
                    if before.exists():  # keep the permissions
                        copy.chmod(before.stat().st_mode)
                else:
                    _copy(source, copy)
        return target


def _class_name(file: Path) -> str:
    """The class name in a component's config; "" if it has none."""
    try:
        config = json_value(read_text(file))
    except (OSError, ValueError):
        return ""
    return str(config.get("_class_name", "")) if isinstance(config, dict) else ""


def _copy(source: Path, target: Path) -> None:
    try:
        source.open("rb").close()
    except OSError as error:  # checked first, so that the message does not blame the target
        raise AdapterError(f"{source} cannot be read ({error.strerror or error})") from None
    shutil.copy2(source, target)


def _same_set(first: tuple[str, Path], second: tuple[str, Path]) -> bool:
    """Whether two files are different shards of the same weights; each is (component, file)."""
    return first[0] == second[0] and first[1] != second[1] and variant(first[1]) == variant(second[1])


@contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    """Like `atomic.replacing_folder`, for a Diffusers folder; other files in the old one are kept."""
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{target} is a file, but a Diffusers folder is to be written: give another name")
    target = target.resolve()  # keep a link as a link
    there = target.is_dir() and any(target.iterdir())
    if there and not (target / INDEX).is_file() and not any(weights_of(target / name) for name in denoisers()):
        raise AdapterError(f"{target} is not a Diffusers folder: give a new folder, or a Diffusers folder to replace")

    def kept(made: Path) -> list[str]:
        return [str(name) for name in other_entries(target) if not (made / name).exists()]

    try:
        with replacing_folder(target, kept, file_by_file=True) as made:
            if there:
                made.chmod(target.stat().st_mode)
            yield made
    except OSError as error:
        raise AdapterError(f"{target} cannot be written ({error.strerror or error})") from None
