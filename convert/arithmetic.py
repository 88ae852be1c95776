"""Arithmetic of adapters. Each method returns a new adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from typing_extensions import Self

from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.casting import cast_changes
from lora_adapters.convert.deltas.low_rank import LowRank, common_scale
from lora_adapters.convert.deltas.sum import added
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.families.unlisted import UNLISTED, check_alike
from lora_adapters.convert.formats import diffusers
from lora_adapters.convert.formats.contents import Contents, most_common
from lora_adapters.convert.formats.metadata import (
    MERGED_FACTS,
    DyLora,
    dylora_metadata,
    network_args,
    sum_facts,
)
from lora_adapters.convert.progress import progress

from .errors import AdapterError


@dataclass(frozen=True, eq=False, repr=False)
class Arithmetic(Contents):
    """The methods of `Adapter` that compute new adapters."""

    def map(self, change, metadata: Mapping[str, str] | None = None) -> Self:
        """Apply a function to the change of every module.

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
        """Convert all tensors to another dtype.

        Factors whose small values the dtype cannot represent are first balanced by powers of two. If that is not
        enough, all alphas are divided by a common factor and the factors are scaled up, so that ΔW stays the same.

        Args:
            dtype: The dtype; None keeps the tensors as they are.
            keep_alpha: Whether to keep all alphas unchanged.

        Returns:
            The new adapter.

        Raises:
            AdapterError: A value is too large for the dtype.
        """
        return self if dtype is None else self.with_modules(cast_changes(self.modules, dtype, keep_alpha))

    def scale(self, weight: float) -> Self:
        """Scale the adapter: weight · ΔW in every module.

        Args:
            weight: The factor; it may be negative or 0.

        Returns:
            The new adapter.

        >>> from lora_adapters.convert import Adapter
        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(1, 2), torch.ones(2, 1), alpha=1.0)})
        >>> a.scale(0.5).modules[to_q].delta().tolist()
        [[0.5, 0.5], [0.5, 0.5]]
        """
        return self.map(lambda delta: delta.scaled(weight))

    def __add__(self, other: "Arithmetic") -> Self:
        """The exact sum of two adapters. Ranks add up; modules that only one adapter has are unchanged.

        Raises:
            AdapterError: The adapters are for different base models, or shapes differ (SD1 and SD2).
        """
        ours, theirs = self.candidates, other.candidates
        if set(ours).isdisjoint(theirs):
            first, second = ("/".join(families[0].titles) for families in (ours, theirs))
            raise AdapterError(f"one adapter is for {first}, the other for {second}")
        if ours == theirs == (UNLISTED,):
            check_alike([("one adapter", self.modules), ("the other", other.modules)])
        modules = dict(self.modules)
        scale = common_scale(
            pair for change in (self, other) for pair in change.modules.values() if isinstance(pair, LowRank)
        )
        for module, change in other.modules.items():
            try:
                modules[module] = added([modules[module], change], scale) if module in modules else change
            except AdapterError as error:
                raise AdapterError(f"{module}: {error}") from None
        facts = sum_facts([self.metadata, other.metadata])
        return self.replaced(modules=modules, metadata={**self.plain_metadata(), **facts}, stored={})

    @classmethod
    def combine(
        cls,
        adapters: Sequence["Arithmetic"],
        weights: Sequence[float],
        method: str,
        density: float,
        *,
        majority: str = "total",
        seed: int = 0,
    ) -> Self:
        """Combine adapters by TIES, DARE or magnitude pruning, as PEFT's `add_weighted_adapter` does with "_svd".

        For a sum without pruning, use `a.scale(0.7) + b.scale(0.3)`. The result can be merged into a model exactly. To
        save it, reduce its rank with `svd` first, since pruned changes are not low-rank.

        Args:
            adapters: The adapters.
            weights: One for each adapter.
            method: "ties", "dare_linear", "dare_ties" or "magnitude_prune".
            density: Fraction of the values of each change to keep, above 0 and at most 1.
            majority: How ties and dare_ties elect the sign: "total" (by sum) or "frequency" (by count).
            seed: Random seed of dare_linear and dare_ties.

        Returns:
            The combined adapter, whose changes are dense.

        Raises:
            AdapterError: The adapters are for different models, or an option is invalid.

        >>> from lora_adapters.convert import Adapter
        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.tensor([[3.0, 1.0]]), torch.ones(1, 1), alpha=1.0)})
        >>> b = Adapter({to_q: LowRank(torch.tensor([[1.0, -4.0]]), torch.ones(1, 1), alpha=1.0)})
        >>> Adapter.combine([a, b], [1.0, 1.0], "ties", 0.5).modules[to_q].delta().tolist()  # the largest of each
        [[3.0, -4.0]]
        """
        from lora_adapters.convert.deltas.combined import Combination
        from lora_adapters.convert.models.merging import combined_changes

        named = {f"adapter {number}": adapter for number, adapter in enumerate(adapters, 1)}
        modules = combined_changes(named, weights, Combination(method, density, majority, seed))
        return cls(modules, sum_facts([adapter.metadata for adapter in adapters]))

    def truncate(self, rank: int) -> Self:
        """Keep the first components of every module, at the scale at which they were trained.

        For a DyLoRA, the result is the adapter of that rank. Modules with fewer components are unchanged.

        Args:
            rank: The number of components; for a DyLoRA, a multiple of its unit.

        Returns:
            The new adapter.

        Raises:
            AdapterError: The adapter cannot be truncated to that rank; the message lists the valid ranks.

        >>> from lora_adapters.convert import Adapter
        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)}).as_dylora(DyLora(unit=2))
        >>> a.truncate(2).modules[to_q]
        LowRank(rank 2, alpha 2.82843, [2, 8] -> 8)
        >>> a.truncate(3)
        Traceback (most recent call last):
        lora_adapters.convert.errors.AdapterError: the adapter cannot be truncated to rank 3: valid ranks are 2, 4
        """
        pairs = self.pairs()
        highest = max((pair.rank for pair in pairs.values()), default=1)
        dylora = self.dylora or DyLora(rank_scaling="constant")  # the components of a plain LoRA keep their scale
        valid = [*range(dylora.unit, highest, dylora.unit), highest]
        if rank not in valid:
            shown = ", ".join(map(str, valid if len(valid) <= 16 else [*valid[:8], "...", *valid[-2:]]))
            raise AdapterError(f"the adapter cannot be truncated to rank {rank}: valid ranks are {shown}")
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
        """The best approximation of every module at a given rank, computed from the factors in float32.

        Source: the truncated SVD is the best approximation of its rank (Eckart and Young, 1936).

        Args:
            rank: The rank; with target_error, the maximum rank (None: no limit).
            conv_rank: The rank of convolutions larger than 1x1; None is rank.
            target_error: The maximum relative error of a module, 0 to 1: the Frobenius norm of the difference, divided
                by that of the change. Each module gets the smallest rank that reaches it.
            device: The device for the computation; None is the CPU.

        Returns:
            The new adapter.

        >>> from lora_adapters.convert import Adapter
        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.ones(4, 8), torch.ones(8, 4), alpha=4.0)})
        >>> a.svd(None, target_error=0.1).rank  # four equal components are one
        1
        """
        from lora_adapters.convert.deltas.reduction import svd

        return svd(self, rank, conv_rank, target_error, device)

    def sorted(self) -> Self:
        """Convert the adapter to a DyLoRA whose components are those of each module's SVD, the largest first.

        `truncate` then returns what `svd` returns for the same rank, so one file contains an adapter of every rank.

        Returns:
            The DyLoRA, in the same dtypes. A DyLoRA keeps its unit. At every rank, the scale is that of the full rank
            ("constant").

        Raises:
            AdapterError: A module is not a low-rank pair, or contains NaN or infinite values.

        >>> from lora_adapters.convert import Adapter
        >>> to_q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
        >>> a = Adapter({to_q: LowRank(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]), alpha=2.0)})
        >>> a.sorted().truncate(1).modules[to_q].delta().round(decimals=4).tolist()
        [[0.0, 0.0], [0.0, 3.0]]
        """
        from lora_adapters.convert.deltas.svd import by_size

        modules: dict[ModuleName, LowRank] = {}
        for module, pair in progress(self.pairs().items(), "SVD", len(self.modules)):
            try:
                modules[module] = by_size(pair).to(pair.up.dtype)
            except AdapterError as error:
                raise AdapterError(f"{module}: {error}") from None
        return self.with_modules(modules).as_dylora(replace(self.dylora or DyLora(), rank_scaling="constant"))

    def resize(self, rank: int, conv_rank: int | None = None, dynamic: tuple[str, float] | None = None) -> Self:
        """The best approximation at a rank, with alpha / rank of every module unchanged, as in kohya's resize_lora.

        Args:
            rank: The rank; with dynamic, the maximum rank.
            conv_rank: The rank of convolutions larger than 1x1; None is rank.
            dynamic: A method of `rank_choice.DYNAMIC_METHODS` and its parameter, which choose the rank of each module.

        Returns:
            The new adapter.
        """
        from lora_adapters.convert.deltas.reduction import resize

        return resize(self, rank, conv_rank, dynamic)

    def with_common_alpha(self) -> Self:
        """The same changes, with the same alpha in all modules: the most common nonzero one, or 1 if all are 0."""
        pairs = self.pairs()
        alpha = most_common(pair.alpha for pair in pairs.values() if pair.alpha) or 1.0
        folded = {module: pair.with_alpha(alpha) for module, pair in pairs.items()}
        return self.replaced(modules=folded, metadata={**self.metadata, "ss_network_alpha": str(float(alpha))})

    def as_dylora(self, dylora: DyLora) -> Self:
        """The same adapter, marked as a DyLoRA in its metadata."""
        return self.replaced(metadata={**self.metadata, **dylora_metadata(dylora, network_args(self.metadata))})

    def plain_metadata(self) -> dict[str, str]:
        """The metadata without entries that do not apply to a combination: rank, alpha, type, blocks."""
        facts = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args")
        gone = (*facts, "sshs_", "modelspec.", "lycoris_version", diffusers.METADATA_KEY)
        return {key: value for key, value in self.metadata.items() if key in MERGED_FACTS or not key.startswith(gone)}
