"""Extracting an adapter from two models: the best approximation of the difference of their weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.svd import Fit
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.models.extraction import Difference, approximate_difference, approximate_otherwise


@dataclass(frozen=True)
class Extraction:
    """The result of an extraction.

    Attributes:
        adapter: The extracted adapter.
        fits: The approximation error of each module.
        largest: The largest absolute difference in each text encoder.
        left_out: The text encoders that are equal in both models.
    """

    adapter: Adapter
    fits: dict[ModuleName, Fit]
    largest: dict[str, float]
    left_out: tuple[str, ...]


def extract(
    base: str | Path, tuned: str | Path, rank: int | None, conv_rank: int | None = None, **options: Any
) -> Extraction:
    """Extract the best adapter of a given rank from the difference between two models, tuned - base.

    Args:
        base: The base model: a checkpoint file or a Diffusers folder.
        tuned: The fine-tuned model: a checkpoint file or a Diffusers folder.
        rank: The rank of linear layers and 1x1 convolutions.
        conv_rank: The rank of larger convolutions; see `approximate_difference`.
        **options: target_error, min_diff, clamp_quantile, device and v_prediction of `approximate_difference`.

    Returns:
        The adapter, its approximation errors, and the text encoders that were left out.

    Raises:
        AdapterError: The models are of different families, or equal.
    """
    return _extraction(approximate_difference(base, tuned, rank, conv_rank, **options))


def extract_otherwise(base: str | Path, tuned: str | Path, algo: str, **options: Any) -> Extraction:
    """Extract an adapter of another type; algo and options are those of `approximate_otherwise`."""
    return _extraction(approximate_otherwise(base, tuned, algo, **options))


def _extraction(difference: Difference) -> Extraction:
    return Extraction(
        Adapter(difference.modules, difference.metadata), difference.fits, difference.largest, difference.left_out
    )
