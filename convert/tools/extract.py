"""The adapter between two models: the best approximation of the difference of their weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.svd import Fit
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.models.extraction import Difference, approximate_difference, approximate_otherwise


@dataclass(frozen=True)
class Extraction:
    """An adapter, how well it meets each module's difference, and what was left out.

    largest: the largest difference of any number in each text encoder; left_out: those that are the same.
    """

    adapter: Adapter
    fits: dict[ModuleName, Fit]
    largest: dict[str, float]
    left_out: tuple[str, ...]


def extract(
    base: str | Path, tuned: str | Path, rank: int | None, conv_rank: int | None = None, **options: Any
) -> Extraction:
    """The best adapter for tuned - base.

    Args:
        base: a model, as a file or a Diffusers folder.
        tuned: the same model, changed.
        rank: of linear layers and 1x1 convolutions.
        conv_rank: of larger convolutions; see `approximate_difference`.
        options: target_error, min_diff, clamp_quantile, device, v_prediction, all of `approximate_difference`.

    Raises:
        AdapterError: the models do not fit together or are the same.
    """
    return _extraction(approximate_difference(base, tuned, rank, conv_rank, **options))


def extract_otherwise(base: str | Path, tuned: str | Path, algo: str, **options: Any) -> Extraction:
    """As `extract`, of another kind: algo and options are those of `approximate_otherwise`."""
    return _extraction(approximate_otherwise(base, tuned, algo, **options))


def _extraction(found: Difference) -> Extraction:
    return Extraction(Adapter(found.modules, found.metadata), found.fits, found.largest, found.left_out)
