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
    """An adapter: the change of each module, and the metadata of its file.

    It is immutable: arithmetic returns new adapters. The tensors of a loaded adapter are views of the memory-mapped
    file until they are used.

    Args:
        modules: The change of each module, `{ModuleName(component, path): change}`: low-rank pairs (`LowRank`), or
            other kinds (see `deltas.Delta`).
        metadata: The metadata of its file, all strings.
        embeddings: Token embeddings that its file holds beside the changes, by the end of their key.
        stored: The tensors of each module as its file has them, so that they are written again unchanged.

    Raises:
        AdapterError: The metadata declare a DyLoRA with an unknown rank_scaling.

    >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)})
    >>> a.architecture, a.components, a + a.scale(0.5)
    ('sd', ('unet',), Adapter(1 modules of unet, rank 8))
    >>> Adapter.load(a.save("a.safetensors")).metadata["ss_network_dim"]
    '4'
    """

    def __post_init__(self) -> None:
        dylora_of(self.metadata)  # invalid DyLoRA metadata is an error here, not after a file has been written

    # --- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, source: str | Path, *, weight_name: str | None = None, subfolder: str | None = None, **hub: Any
    ) -> Self:
        """Read an adapter from a file, a folder or a Hub repository, in any of FORMATS.

        Args:
            source: A file, a folder, or a repository (owner/name).
            weight_name: The file in the folder or repository, if there are several.
            subfolder: The folder in the folder or repository.
            **hub: Options of `huggingface_hub`: token, revision, cache_dir, local_files_only, ...

        Returns:
            The adapter.

        Raises:
            AdapterError: The source is missing, damaged, or in another format; the message names the file.
        """
        return cls.from_path(locate(source, weight_name=weight_name, subfolder=subfolder, **hub))

    @classmethod
    def from_path(cls, path: Path, lookup: Lookup | None = None, only_pairs: bool = False) -> Self:
        """Read an adapter from a local file or PEFT folder.

        Args:
            path: The file or folder.
            lookup: As in `from_tensors`.
            only_pairs: As in `from_tensors`.

        Returns:
            The adapter.

        Raises:
            AdapterError: As for `from_tensors`; the message names the path.
        """
        weights = (peft.WEIGHTS, peft.WEIGHTS_PICKLED)
        if path.name in weights and (path.parent / peft.CONFIG).is_file():
            path = path.parent  # that file tells neither alphas nor the component
        if path.is_dir():
            return cls._of(peft.read_folder(path, lookup))
        tensors, metadata = read_tensors(path)
        try:
            return cls.from_tensors(tensors, metadata, lookup, only_pairs)
        except AdapterError as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
        lookup: Lookup | None = None,
        only_pairs: bool = False,
    ) -> Self:
        """Read an adapter from a state dict in kohya's, LyCORIS', cloneofsimo's or one of diffusers' formats.

        Args:
            tensors: The state dict. The tensors are not copied.
            metadata: The metadata of its file, all strings.
            lookup: Called with a component and a name that no known model has; returns the module's path. It finds
                modules of a live model.
            only_pairs: Whether to refuse other kinds of change than low-rank pairs.

        Returns:
            The adapter.

        Raises:
            UnknownFormatError: Another kind of adapter.
            AdapterError: Unknown keys or modules, one half of a pair without the other, or shapes that do not fit.
        """
        return cls._of(registry.read(tensors, dict(metadata or {}), lookup, only_pairs))

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
        """Write the adapter, whole or not at all.

        Args:
            path: The file, or the folder for "peft". Another suffix than .safetensors is torch's pickle.
            format: "kohya" (which A1111 and ComfyUI read too), "diffusers" (alphas folded into the weights), "peft",
                "lycoris" (any kind of change), or "cloneofsimo" (the positional format of cloneofsimo/lora, for SD1.x
                and SD2.x). None is "kohya", or "lycoris" if some changes are not low-rank pairs.
            dtype: The dtype of the weights; None keeps each tensor's own.
            fold_alpha: Whether all modules get the most common alpha and `up` takes the difference, since stock
                diffusers mixes up alphas that differ.
            embeddings: Token embeddings to write beside the changes, by token; "cloneofsimo" only.
            modelspec: Whether to add modelspec metadata to kohya's own.

        Returns:
            The path.

        Raises:
            AdapterError: The adapter has no modules, or the path cannot be written; a file that was there before is
                unchanged.
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
        """A new adapter with a function applied to the change of every module.

        Args:
            change: The function, from a change to a change.
            metadata: Entries to add to the metadata.

        Returns:
            The new adapter.
        """
        modules = {module: change(delta) for module, delta in self.modules.items()}
        return self.replaced(modules=modules, metadata={**self.metadata, **(metadata or {})})

    def with_modules(self, modules: Mapping[ModuleName, Delta]) -> Self:
        """A new adapter with other modules and the same metadata."""
        return self.replaced(modules=modules)

    def to(self, dtype: torch.dtype | None, keep_alpha: bool = False) -> Self:
        """The adapter with all tensors in another dtype.

        Factors that would lose small numbers in it are balanced by powers of two first. If that is not enough, all
        alphas are divided by one factor and the factors multiplied, so that ΔW is the same.

        Args:
            dtype: The dtype; None keeps the tensors as they are.
            keep_alpha: Whether alphas must not change.

        Returns:
            The new adapter.

        Raises:
            AdapterError: A number is too large for the dtype.
        """
        return self if dtype is None else self.with_modules(cast_changes(self.modules, dtype, keep_alpha))

    def scale(self, weight: float) -> Self:
        """The adapter with weight · ΔW in every module.

        Args:
            weight: The factor; it may be negative or 0.

        Returns:
            The new adapter.

        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(1, 2), torch.ones(2, 1), alpha=1.0)})
        >>> a.scale(0.5).modules[to_q].delta().tolist()
        [[0.5, 0.5], [0.5, 0.5]]
        """
        return self.map(lambda delta: delta.scaled(weight))

    def __add__(self, other: "Adapter") -> Self:
        """The exact sum of two adapters: ranks of pairs add up; modules of only one adapter stay as they are.

        Raises:
            AdapterError: They are for different base models, or shapes differ (SD1 and SD2).
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
        """The first components of every module, at the scale that they were trained at.

        For a DyLoRA this is the adapter of that rank. Modules with fewer components stay whole.

        Args:
            rank: How many components; for a DyLoRA a multiple of its unit.

        Returns:
            The new adapter.

        Raises:
            AdapterError: It cannot be cut to that rank; the message lists the valid ones.

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
        """The best approximation of every module at a rank, computed from the factors in float32.

        Source: the truncated SVD is the best approximation of its rank (Eckart and Young, 1936).

        Args:
            rank: The rank, or with target_error the largest one allowed (None: no limit).
            conv_rank: The rank in convolutions larger than 1x1; None is rank.
            target_error: The largest relative error of a module, 0 to 1: the Frobenius norm of the difference, divided
                by that of the change. Each module gets the smallest rank that meets it.
            device: The device for the computation; None is the CPU.

        Returns:
            The new adapter.

        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)})
        >>> a.svd(None, target_error=0.1).rank  # four equal components are one
        1
        """
        from lora_adapters.convert.deltas.reduction import svd

        return svd(self, rank, conv_rank, target_error, device)

    def resize(self, rank: int, conv_rank: int | None = None, dynamic: tuple[str, float] | None = None) -> Self:
        """The best approximation at a rank, with alpha / rank of every module unchanged, as kohya's resize_lora does.

        Args:
            rank: The rank, or with dynamic the largest one allowed.
            conv_rank: The rank in convolutions larger than 1x1; None is rank.
            dynamic: A method of `rank_choice.DYNAMIC_METHODS` and its parameter, by which each module's rank is chosen.

        Returns:
            The new adapter.
        """
        from lora_adapters.convert.deltas.reduction import resize

        return resize(self, rank, conv_rank, dynamic)

    @classmethod
    def from_difference(
        cls, base: str | Path, tuned: str | Path, rank: int, conv_rank: int | None = None, **options: Any
    ) -> Self:
        """The best adapter of a rank for the difference of two models, tuned - base.

        Args:
            base: The base model, a checkpoint file or a Diffusers folder.
            tuned: The fine-tuned model, likewise.
            rank: The rank of linear layers and 1x1 convolutions.
            conv_rank: The rank of larger convolutions (LoRA-C3Lier); None leaves them out (LoRA-LierLa).
            **options: target_error, min_diff, clamp_quantile, device, v_prediction: see
                `lora_adapters.convert.models.extraction.approximate_difference`.

        Returns:
            The adapter.

        Raises:
            AdapterError: The models are of different kinds, or equal.
        """
        from lora_adapters.convert.models.extraction import approximate_difference

        found = approximate_difference(base, tuned, rank, conv_rank, **options)
        return cls(found.modules, found.metadata)

    def merge_into(self, model: str | Path, out: str | Path, weight: float = 1.0) -> Path:
        """Write a model with weight · ΔW added to its weights.

        Tensors that are not adapted are copied bit for bit; the others keep their dtype.

        Args:
            model: A checkpoint file or a Diffusers folder.
            out: The file or folder to write.
            weight: The factor of the change.

        Returns:
            The path of the result.

        Raises:
            AdapterError: The adapter is for another model. Nothing is written then.
        """
        from lora_adapters.convert.models.merging import merge_into_model

        return merge_into_model(model, out, [self], [weight])

    def with_common_alpha(self) -> Self:
        """The same changes with one alpha in all modules: the most common one that is not 0, or 1 if all are 0."""
        pairs = self.pairs()
        alpha = most_common(pair.alpha for pair in pairs.values() if pair.alpha) or 1.0
        folded = {module: pair.with_alpha(alpha) for module, pair in pairs.items()}
        return self.replaced(modules=folded, metadata={**self.metadata, "ss_network_alpha": str(float(alpha))})

    def as_dylora(self, dylora: DyLora) -> Self:
        """The same adapter, marked as a DyLoRA in its metadata."""
        return self.replaced(metadata={**self.metadata, **dylora_metadata(dylora, network_args(self.metadata))})

    def plain_metadata(self) -> dict[str, str]:
        """The metadata without the entries that are not true of a combination: rank, alpha, type, blocks."""
        facts = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
        gone = (*facts, "sshs_", "modelspec.", "lycoris_version", diffusers.METADATA_KEY)
        return {key: value for key, value in self.metadata.items() if key in MERGED_FACTS or not key.startswith(gone)}
