"""The adapter: one small object that is read from files, does arithmetic, and is written to files."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.low_rank import LowRank, add_up, common_scale, rank_range, to_narrow
from lora_adapters.convert.families.detection import family_of
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import Lookup, ModuleName
from lora_adapters.convert.families.registry import BASE_VERSION, by_kohya_names
from lora_adapters.convert.formats import cloneofsimo, diffusers, kohya, peft
from lora_adapters.convert.formats.kinds import unread, without_bundled_embeddings
from lora_adapters.convert.formats.metadata import (
    MERGED_FACTS,
    DyLora,
    complete,
    dylora_metadata,
    dylora_of,
    hashes,
    merged_facts,
    network_args,
)
from lora_adapters.convert.storage.files import read_tensors, replacing, save_pickle
from lora_adapters.convert.storage.sources import locate

from .errors import AdapterError
from .live import LiveAdapter

FORMATS = ("kohya", "diffusers", "peft", "cloneofsimo")
T = TypeVar("T")


def _most_common(values: Iterable[T]) -> T | None:
    """The value that occurs most often, the first of several; None where there are none."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(LiveAdapter):
    """`{ModuleName(component, path): LowRank}` and the metadata of its file (all strings).

    The tensors of a loaded adapter are views of the memory-mapped file until they are used. Nothing changes an adapter:
    arithmetic gives new ones. AdapterError where the metadata says that it is a DyLoRA of an unknown rank_scaling.

    >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)})
    >>> a.architecture, a.components, a + a.scale(0.5)
    ('sd', ('unet',), Adapter(1 modules of unet, rank 8))
    >>> Adapter.load(a.save("a.safetensors")).metadata["ss_network_dim"]
    '4'
    """

    modules: Mapping[ModuleName, LowRank]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dylora_of(self.metadata)  # facts that make no sense are found here, not after a file of it has been written

    # --- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, source: str | Path, *, weight_name: str | None = None, subfolder: str | None = None, **hub: Any
    ) -> Self:
        """Read an adapter from a file, a folder or a Hub repository, in any of FORMATS.

        `hub` options (token, revision, cache_dir, local_files_only, ...) go to `huggingface_hub`. AdapterError, with
        the file in it, where the source is missing, broken, or in another format.
        """
        return cls.from_path(locate(source, weight_name=weight_name, subfolder=subfolder, **hub))

    @classmethod
    def from_path(cls, path: Path, lookup: Lookup | None = None) -> Self:
        """The adapter in a file or a PEFT folder; lookup as in `from_tensors`. AdapterError with the path in it."""
        weights = (peft.WEIGHTS, peft.WEIGHTS_PICKLED)
        if path.name in weights and (path.parent / peft.CONFIG).is_file():
            path = path.parent  # that file tells neither alphas nor the component
        if path.is_dir():
            modules, metadata = peft.read(path, lookup)
            return cls(modules, metadata)
        tensors, metadata = read_tensors(path)
        try:
            return cls.from_tensors(tensors, metadata, lookup)
        except AdapterError as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
        lookup: Lookup | None = None,
    ) -> Self:
        """The adapter in a state dict of kohya's, cloneofsimo's or one of diffusers' formats.

        The tensors are not copied. lookup (component, name -> path): finds modules that SD1.x, SD2.x and SDXL do not
        have, in a live model. AdapterError for other keys, lone halves of pairs, unknown modules and shapes that do
        not fit; UnknownFormatError for other kinds of adapters.
        """
        metadata = dict(metadata or {})
        tensors = without_bundled_embeddings(tensors)
        if not tensors:
            raise AdapterError("there are no tensors in it")
        if all(key.startswith(peft.PREFIX) for key in tensors):
            raise unread(tensors, f"these are weights of PEFT's, without the {peft.CONFIG} beside them")
        if kohya.is_mine(set(tensors)):
            modules = kohya.read(tensors, lookup)
            family = by_kohya_names(tensors)
            if family is not None and family.has(modules):
                metadata.setdefault(BASE_VERSION, family.versions[0].value)
            return cls(modules, metadata)
        if cloneofsimo.is_mine(set(tensors)):
            return cls(cloneofsimo.read(tensors, metadata), cloneofsimo.other_metadata(metadata))
        if diffusers.is_mine(set(tensors)):
            return cls(diffusers.read(tensors, metadata, lookup), diffusers.kohya_metadata(metadata))
        known = kohya if any(kohya.is_mine({key}) for key in tensors) else diffusers
        strange = next((key for key in tensors if not known.is_mine({key})), next(iter(tensors)))
        raise unread(tensors, f"{strange:.120} is no key of kohya's or diffusers' LoRA formats")

    def save(
        self,
        path: str | Path,
        format: str = "kohya",
        dtype: torch.dtype | None = None,
        fold_alpha: bool = False,
        embeddings: Mapping[str, torch.Tensor] | None = None,
        modelspec: bool = True,
    ) -> Path:
        """Write the adapter, whole or not at all, and give back its path.

        format: "kohya" (also what A1111 and ComfyUI read), "diffusers" (alphas folded into the weights), both one
        file; or "peft", a folder. dtype None keeps each tensor's own. fold_alpha gives all modules of a kohya file the
        most common alpha and puts the difference into `up`: stock diffusers mixes up alphas that differ. "cloneofsimo"
        is the positional format of cloneofsimo/lora, for SD1.x and SD2.x; it can carry `embeddings` of tokens. Another
        ending than .safetensors is torch's pickle. Without modelspec the file gets kohya's own metadata only.
        AdapterError for an adapter without modules and where the path cannot be written; what was there before is still
        there then.
        """
        if format not in FORMATS:
            raise AdapterError(f"unknown format {format}: {', '.join(FORMATS)} are known")
        if not self.modules:
            raise AdapterError(f"{path} is not written: the adapter has no modules")
        path = Path(path).expanduser()
        adapter = self.with_common_alpha() if fold_alpha else self
        without_alphas = format in ("diffusers", "cloneofsimo")
        if without_alphas:  # before the numbers become narrower
            adapter = adapter.map(lambda one: one.with_alpha(float(one.rank)) if one.alpha else one)
        adapter = adapter.to(dtype, keep_alpha=without_alphas)
        if format in ("peft", "diffusers"):
            from lora_adapters.convert.formats.projections import in_own_shapes

            adapter = adapter.with_modules(in_own_shapes(adapter.modules, adapter.metadata))
        if format == "peft":
            dylora = self.dylora
            tuner = {"type": "DyLora", **asdict(dylora)} if dylora else {}
            peft.write(path, adapter.modules, adapter.full_metadata(), tuner)
            return path
        metadata = adapter.full_metadata()
        if not modelspec:
            metadata = {key: text for key, text in metadata.items() if not key.startswith("modelspec.")}
        if format == "kohya":
            tensors = kohya.write(adapter.modules, self.architecture)
            metadata |= hashes(tensors, metadata)
        elif format == "cloneofsimo":
            tensors, metadata = cloneofsimo.write(adapter.modules, self.architecture, embeddings or {})
        else:
            tensors, own = diffusers.write(adapter.modules)
            metadata = {**metadata, **own, "ss_network_alpha": str(float(adapter.rank))}
        with replacing(path, durable=True) as partial:
            if path.suffix == ".safetensors":
                safetensors.torch.save_file(tensors, partial, metadata)
            else:
                save_pickle(tensors, partial)
        return path

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def family(self) -> ModelFamily:
        """The family of base models that it is for, told from the module names, the metadata and the widths."""
        return family_of(self.modules, self.metadata)

    @property
    def architecture(self) -> str:
        """The name of its family: "sd" (SD1.x, SD2.x) or "sdxl"."""
        return self.family.name

    @property
    def components(self) -> tuple[str, ...]:
        """The components that it has modules of."""
        return tuple(dict.fromkeys(module.component for module in self.modules))

    @property
    def rank(self) -> int:
        """The rank (number of components) that most of its modules have; 0 without modules."""
        return _most_common(one.rank for one in self.modules.values()) or 0

    @property
    def dylora(self) -> DyLora | None:
        """Unit and rank scaling where the metadata says that it is a DyLoRA, else None."""
        return dylora_of(self.metadata)

    def full_metadata(self) -> dict[str, str]:
        """The metadata with everything that readers of kohya's files expect, but for the hashes."""
        alpha = _most_common(one.alpha for one in self.modules.values()) or 0.0
        return complete(self.metadata, self.architecture, self.rank, alpha)

    def __repr__(self) -> str:
        kind = f", DyLoRA unit {self.dylora.unit}" if self.dylora else ""
        ranks = rank_range(one.rank for one in self.modules.values())
        return f"Adapter({len(self.modules)} modules of {', '.join(self.components)}, rank {ranks}{kind})"

    # --- arithmetic ------------------------------------------------------------------------------------------------

    def map(self, change, metadata: Mapping[str, str] | None = None) -> Self:
        """A new adapter with `change(low_rank)`, a LowRank, for every module, and metadata entries added."""
        modules = {module: change(one) for module, one in self.modules.items()}
        return replace(self, modules=modules, metadata={**self.metadata, **(metadata or {})})

    def with_modules(self, modules: Mapping[ModuleName, LowRank]) -> Self:
        """Other modules under the same metadata."""
        return replace(self, modules=modules)

    def to(self, dtype: torch.dtype | None, keep_alpha: bool = False) -> Self:
        """All factors in another dtype; None keeps them. AdapterError where a number is too large for it.

        Where factors would lose small numbers in it, they are balanced by powers of two, and where that is not enough
        all alphas become smaller by the same factor (not with keep_alpha): ΔW is the same.
        """
        if dtype is None:
            return self
        cast = self.with_modules(to_narrow(self.modules, dtype, keep_alpha))
        for module, one in self.modules.items():
            narrower = any(torch.finfo(factor.dtype).max > torch.finfo(dtype).max for factor in (one.down, one.up))
            if narrower and not cast.modules[module].is_finite() and one.is_finite():
                raise AdapterError(f"{module} has numbers that are too large for {str(dtype).removeprefix('torch.')}")
        return cast

    def scale(self, weight: float) -> Self:
        """weight · ΔW in every module; the weight may be negative or 0.

        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(1, 2), torch.ones(2, 1), alpha=1.0)})
        >>> a.scale(0.5).modules[to_q].delta().tolist()
        [[0.5, 0.5], [0.5, 0.5]]
        """
        return self.map(lambda one: one.scaled(weight))

    def __add__(self, other: "Adapter") -> Self:
        """The sum of both, exactly; ranks add up, modules of only one stay.

        AdapterError where they are for different families, or where shapes differ (SD1 and SD2).
        """
        ours, theirs = self.family, other.family
        if ours is not theirs:
            raise AdapterError(f"one adapter is for {'/'.join(ours.titles)}, the other for {'/'.join(theirs.titles)}")
        modules = dict(self.modules)
        scale = common_scale([*self.modules.values(), *other.modules.values()])
        for module, one in other.modules.items():
            try:
                modules[module] = add_up([modules[module], one], scale) if module in modules else one
            except AdapterError as error:
                raise AdapterError(f"{module}: {error}") from None
        facts = merged_facts([self.metadata, other.metadata])
        return replace(self, modules=modules, metadata={**self.plain_metadata(), **facts})

    def truncate(self, rank: int) -> Self:
        """The first `rank` components of every module, at the scale that they were trained for.

        For a DyLoRA this is the adapter of that rank; AdapterError where the rank is no multiple of its unit. Modules
        of fewer components stay whole.

        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)}).as_dylora(DyLora(unit=2))
        >>> a.truncate(2).modules[to_q]
        LowRank(rank 2, alpha 2.82843, [2, 8] -> 8)
        >>> a.truncate(3)
        Traceback (most recent call last):
        lora_adapters.convert.errors.AdapterError: rank 3 is not one that this adapter can be cut to: 2, 4
        """
        highest = max((one.rank for one in self.modules.values()), default=1)
        dylora = self.dylora or DyLora(rank_scaling="constant")  # a plain LoRA's first components, as they are
        valid = [*range(dylora.unit, highest, dylora.unit), highest]
        if rank not in valid:
            shown = ", ".join(map(str, valid if len(valid) <= 16 else [*valid[:8], "...", *valid[-2:]]))
            raise AdapterError(f"rank {rank} is not one that this adapter can be cut to: {shown}")
        facts = {"ss_network_dim": str(rank)}
        cut = self.map(lambda one: one.truncated(rank, dylora.rank_scaling), facts)
        alpha = _most_common(one.alpha for one in cut.modules.values()) or 0.0
        return replace(cut, metadata={**cut.metadata, "ss_network_alpha": str(float(alpha))})

    def svd(
        self,
        rank: int | None,
        conv_rank: int | None = None,
        *,
        target_error: float | None = None,
        device: str | None = None,
    ) -> Self:
        """The best approximation with `rank` components, and `conv_rank` (else rank) in convolutions above 1x1.

        With target_error each module gets the smallest rank whose relative error is at most that; rank and conv_rank
        are then the largest ranks allowed, and may be None. The relative error is the Frobenius norm of what is
        missing, by that of all, 0 to 1. Computed from the factors on `device` (the CPU by default); float32.
        Source: the truncated SVD is the best approximation of its rank (Eckart and Young, 1936).

        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)})
        >>> a.svd(None, target_error=0.1).rank  # four equal components are one
        1
        """
        from lora_adapters.convert.deltas.svd import svd

        return svd(self, rank, conv_rank, target_error, device)

    def resize(self, rank: int, conv_rank: int | None = None, dynamic: tuple[str, float] | None = None) -> Self:
        """As `svd`, but alpha / rank stays as it was in every module, as kohya's resize_lora does.

        dynamic: a method of `rank_choice.DYNAMIC_METHODS` and its parameter, which choose ranks up to these.
        """
        from lora_adapters.convert.deltas.svd import resize

        return resize(self, rank, conv_rank, dynamic)

    @classmethod
    def from_difference(
        cls, base: str | Path, tuned: str | Path, rank: int, conv_rank: int | None = None, **options: Any
    ) -> Self:
        """The best adapter of that rank for tuned - base, two models in files or Diffusers folders.

        conv_rank None is LoRA-LierLa. `options` are those of
        `lora_adapters.convert.models.extraction.approximate_difference`: target_error, min_diff, clamp_quantile,
        device, v_prediction. AdapterError where the models do not fit together or are the
        same.
        """
        from lora_adapters.convert.models.extraction import approximate_difference

        found = approximate_difference(base, tuned, rank, conv_rank, **options)
        return cls(found.modules, found.metadata)

    def merge_into(self, model: str | Path, out: str | Path, weight: float = 1.0) -> Path:
        """Write the model (a file, or a Diffusers folder) to `out` with weight · ΔW added to its weights.

        Tensors that are not adapted are copied bit for bit, the others keep their dtype. AdapterError where
        the adapter is for another model; `out` is then not written.
        """
        from lora_adapters.convert.models.merging import merge_into_model

        return merge_into_model(model, out, [self], [weight])

    def with_common_alpha(self) -> Self:
        """The same changes with one alpha in all modules, the most common one that is not 0 (1 where all are)."""
        alpha = _most_common(one.alpha for one in self.modules.values() if one.alpha) or 1.0
        return self.map(lambda one: one.with_alpha(alpha), {"ss_network_alpha": str(float(alpha))})

    def as_dylora(self, dylora: DyLora) -> Self:
        """The same adapter, marked as a DyLoRA in its metadata."""
        return replace(self, metadata={**self.metadata, **dylora_metadata(dylora, network_args(self.metadata))})

    def plain_metadata(self) -> dict[str, str]:
        """Metadata without what is no longer true of a combination: rank, alpha, type, blocks."""
        facts = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
        gone = (*facts, "sshs_", "modelspec.", diffusers.METADATA_KEY)
        return {key: value for key, value in self.metadata.items() if key in MERGED_FACTS or not key.startswith(gone)}
