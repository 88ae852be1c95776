"""The adapter: one small object that is read from files, does arithmetic, and is written to files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.casting import cast_changes
from lora_adapters.convert.deltas.low_rank import LowRank, common_scale, rank_range
from lora_adapters.convert.deltas.sum import added, as_pair
from lora_adapters.convert.families.names import Lookup, ModuleName
from lora_adapters.convert.formats import diffusers, peft, registry
from lora_adapters.convert.formats.contents import Contents, WriteOptions, most_common
from lora_adapters.convert.formats.metadata import (
    MERGED_FACTS,
    DyLora,
    dylora_metadata,
    dylora_of,
    merged_facts,
    network_args,
)
from lora_adapters.convert.storage.files import read_tensors
from lora_adapters.convert.storage.sources import locate

from .errors import AdapterError
from .live import LiveAdapter

FORMATS = registry.NAMES


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(Contents, LiveAdapter):
    """`{ModuleName(component, path): change}` and the metadata of its file (all strings).

    Changes are low-rank pairs (`LowRank`) or of other kinds (see `deltas.Delta`); `pairs()` are those of an adapter
    that has no other. `embeddings` of tokens and `stored` are what its file has beside them.
    The tensors of a loaded adapter are views of the memory-mapped file until they are used. Nothing changes an adapter:
    arithmetic gives new ones. AdapterError where the metadata says that it is a DyLoRA of an unknown rank_scaling.

    >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)})
    >>> a.architecture, a.components, a + a.scale(0.5)
    ('sd', ('unet',), Adapter(1 modules of unet, rank 8))
    >>> Adapter.load(a.save("a.safetensors")).metadata["ss_network_dim"]
    '4'
    """

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
        """The adapter in a file or a PEFT folder; lookup as in `from_tensors`.

        AdapterError with the path in it.
        """
        weights = (peft.WEIGHTS, peft.WEIGHTS_PICKLED)
        if path.name in weights and (path.parent / peft.CONFIG).is_file():
            path = path.parent  # that file tells neither alphas nor the component
        if path.is_dir():
            return cls._of(peft.read_folder(path, lookup))
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
        """The adapter in a state dict of kohya's, LyCORIS', cloneofsimo's or one of diffusers' formats.

        The tensors are not copied. lookup (component, name -> path): finds modules that SD1.x, SD2.x and SDXL do not
        have, in a live model. AdapterError for other keys, lone
        halves of pairs, unknown modules and shapes that do not fit; UnknownFormatError for other kinds of adapters.
        """
        return cls._of(registry.read(tensors, dict(metadata or {}), lookup))

    @classmethod
    def _of(cls, contents: Contents) -> Self:
        return cls(contents.modules, contents.metadata, embeddings=contents.embeddings, stored=contents.stored)

    def save(
        self,
        path: str | Path,
        format: str | None = None,
        dtype: torch.dtype | None = None,
        fold_alpha: bool = False,
        embeddings: Mapping[str, torch.Tensor] | None = None,
        modelspec: bool = True,
    ) -> Path:
        """Write the adapter, whole or not at all, and give back its path.

        format: "kohya" (also what A1111 and ComfyUI read), "diffusers" (alphas folded into the weights), both one
        file; "peft", a folder; or "lycoris", a file of changes of any kinds. None is "kohya", or "lycoris" where not
        all changes are pairs. dtype None keeps each tensor's own. fold_alpha gives all modules of a kohya file the most
        common alpha and puts the difference into `up`: stock diffusers mixes up alphas that differ. "cloneofsimo"
        is the positional format of cloneofsimo/lora, for SD1.x and SD2.x; it can carry `embeddings` of tokens. Another
        ending than .safetensors is torch's pickle. Without modelspec the file gets kohya's own metadata only.
        AdapterError for an adapter without modules and where the path cannot be written; what was there before is still
        there then.
        """
        chosen = registry.by_name(format or ("kohya" if self._has_only_pairs else "lycoris"))
        if not self.modules:
            raise AdapterError(f"{path} is not written: the adapter has no modules")
        path = Path(path).expanduser()
        adapter = self.with_common_alpha() if fold_alpha else self
        chosen.write(path, adapter, WriteOptions(dtype, modelspec, embeddings or {}))
        return path

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def _has_only_pairs(self) -> bool:
        return all(as_pair(change) is not None for change in self.modules.values())

    def __repr__(self) -> str:
        kind = f", DyLoRA unit {self.dylora.unit}" if self.dylora else ""
        ranks = rank_range(one.rank for one in self.modules.values() if one.rank is not None)
        if set(self.kinds) - {"LoRA"}:
            kind = f", {', '.join(self.kinds)}"
        return f"Adapter({len(self.modules)} modules of {', '.join(self.components)}, rank {ranks}{kind})"

    # --- arithmetic ------------------------------------------------------------------------------------------------

    def map(self, change, metadata: Mapping[str, str] | None = None) -> Self:
        """A new adapter with `change(one)` for the change of every module, and metadata entries added."""
        modules = {module: change(one) for module, one in self.modules.items()}
        return self.replaced(modules=modules, metadata={**self.metadata, **(metadata or {})})

    def with_modules(self, modules: Mapping[ModuleName, Delta]) -> Self:
        """Other modules under the same metadata."""
        return self.replaced(modules=modules)

    def to(self, dtype: torch.dtype | None, keep_alpha: bool = False) -> Self:
        """All tensors in another dtype; None keeps them. AdapterError where a number is too large for it.

        Where factors would lose small numbers in it, they are balanced by powers of two, and where that is not enough
        all alphas become smaller by the same factor (not with keep_alpha): ΔW is the same.
        """
        return self if dtype is None else self.with_modules(cast_changes(self.modules, dtype, keep_alpha))

    def scale(self, weight: float) -> Self:
        """weight · ΔW in every module; the weight may be negative or 0.

        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(1, 2), torch.ones(2, 1), alpha=1.0)})
        >>> a.scale(0.5).modules[to_q].delta().tolist()
        [[0.5, 0.5], [0.5, 0.5]]
        """
        return self.map(lambda one: one.scaled(weight))

    def __add__(self, other: "Adapter") -> Self:
        """The sum of both, exactly; ranks of pairs add up, modules of only one stay.

        AdapterError where they are for different families, or where shapes differ (SD1 and SD2).
        """
        ours, theirs = self.family, other.family
        if ours is not theirs:
            raise AdapterError(f"one adapter is for {'/'.join(ours.titles)}, the other for {'/'.join(theirs.titles)}")
        modules = dict(self.modules)
        scale = common_scale(
            pair for one in (self, other) for pair in one.modules.values() if isinstance(pair, LowRank)
        )
        for module, one in other.modules.items():
            try:
                modules[module] = added([modules[module], one], scale) if module in modules else one
            except AdapterError as error:
                raise AdapterError(f"{module}: {error}") from None
        facts = merged_facts([self.metadata, other.metadata])
        return self.replaced(modules=modules, metadata={**self.plain_metadata(), **facts}, stored={})

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
        pairs = self.pairs()
        highest = max((one.rank for one in pairs.values()), default=1)
        dylora = self.dylora or DyLora(rank_scaling="constant")  # a plain LoRA's first components, as they are
        valid = [*range(dylora.unit, highest, dylora.unit), highest]
        if rank not in valid:
            shown = ", ".join(map(str, valid if len(valid) <= 16 else [*valid[:8], "...", *valid[-2:]]))
            raise AdapterError(f"rank {rank} is not one that this adapter can be cut to: {shown}")
        facts = {"ss_network_dim": str(rank)}
        cut = {module: pair.truncated(rank, dylora.rank_scaling) for module, pair in pairs.items()}
        alpha = most_common(pair.alpha for pair in cut.values()) or 0.0
        facts |= {"ss_network_alpha": str(float(alpha))}
        return self.replaced(modules=cut, metadata={**self.metadata, **facts})

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
        from lora_adapters.convert.deltas.reduction import svd

        return svd(self, rank, conv_rank, target_error, device)

    def resize(self, rank: int, conv_rank: int | None = None, dynamic: tuple[str, float] | None = None) -> Self:
        """As `svd`, but alpha / rank stays as it was in every module, as kohya's resize_lora does.

        dynamic: a method of `rank_choice.DYNAMIC_METHODS` and its parameter, which choose ranks up to these.
        """
        from lora_adapters.convert.deltas.reduction import resize

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
        pairs = self.pairs()
        alpha = most_common(pair.alpha for pair in pairs.values() if pair.alpha) or 1.0
        folded = {module: pair.with_alpha(alpha) for module, pair in pairs.items()}
        return self.replaced(modules=folded, metadata={**self.metadata, "ss_network_alpha": str(float(alpha))})

    def as_dylora(self, dylora: DyLora) -> Self:
        """The same adapter, marked as a DyLoRA in its metadata."""
        return self.replaced(metadata={**self.metadata, **dylora_metadata(dylora, network_args(self.metadata))})

    def plain_metadata(self) -> dict[str, str]:
        """Metadata without what is no longer true of a combination: rank, alpha, type, blocks."""
        facts = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
        gone = (*facts, "sshs_", "modelspec.", "lycoris_version", diffusers.METADATA_KEY)
        return {key: value for key, value in self.metadata.items() if key in MERGED_FACTS or not key.startswith(gone)}
