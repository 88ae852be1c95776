"""Builds the command lines of the file tools from the values of their forms."""

from collections.abc import Sequence
from pathlib import Path

from lora_adapters.convert.choices import FORMATS
from lora_adapters.convert.parsing import number
from lora_adapters.train.studio.paths import Folders, StudioError

OWN = "as it comes"  # the program's default precision
PRECISIONS = (OWN, "float", "fp16", "bf16")
_FOLDERS = ("peft",)  # formats that are folders


def merge(
    folders: Folders, adapters: Sequence[str], weights: str, into_model: bool, name: str, precision: str
) -> list[str]:
    """The command line that merges adapters exactly into one, or into the model.

    Args:
        folders: The folders of the studio.
        adapters: The names of the adapters.
        weights: Comma-separated numbers; empty is 1 for each.
        into_model: Merge into the base model; False merges the adapters into one.
        name: The name of the result.
        precision: The dtype of the result; empty keeps the default.

    Returns:
        The words after `lora-adapters`.

    Raises:
        StudioError: A file is outside of the folders, or the name is taken.
    """
    ending = "" if into_model and Path(folders.model).is_dir() else ".safetensors"
    words = ["merge", f"--save_to={folders.new(name, ending)}", *_precision(precision)]
    words += [f"--sd_model={folders.model}"] if into_model else []
    return [*words, *_models(folders, adapters, weights)]


def svd_merge(
    folders: Folders,
    adapters: Sequence[str],
    weights: str,
    rank: float,
    conv_rank: float | None,
    name: str,
    precision: str,
) -> list[str]:
    """The command line that merges adapters into one of a given rank.

    Args:
        folders: The folders of the studio.
        adapters: The names of the adapters.
        weights: Comma-separated numbers; empty is 1 for each.
        rank: The rank of linear layers and 1x1 convolutions.
        conv_rank: The rank of larger convolutions; None uses `rank`.
        name: The name of the result.
        precision: The dtype of the result; empty keeps the default.

    Returns:
        The words after `lora-adapters`.

    Raises:
        StudioError: A file is outside of the folders, or the name is taken.
    """
    words = ["svd-merge", f"--save_to={folders.new(name, '.safetensors')}", *_precision(precision)]
    words += [f"--new_rank={_rank(rank)}", *_conv("new_conv_rank", conv_rank)]
    return [*words, *_models(folders, adapters, weights)]


def extract(
    folders: Folders,
    tuned: str,
    rank: float,
    conv_rank: float | None,
    target_error: float | None,
    name: str,
    precision: str,
) -> list[str]:
    """The command line that extracts the difference of another model from the studio's model as an adapter.

    Args:
        folders: The folders of the studio.
        tuned: The name of the fine-tuned model.
        rank: The rank of linear layers and 1x1 convolutions.
        conv_rank: The rank of larger convolutions; None leaves them out.
        target_error: The relative error to reach; None uses only the rank.
        name: The name of the result.
        precision: The dtype of the result; empty keeps the default.

    Returns:
        The words after `lora-adapters`.

    Raises:
        StudioError: A file is outside of the folders, or the name is taken.
    """
    words = ["extract", f"--model_org={folders.model}", f"--model_tuned={folders.base_model(tuned)}"]
    words += [f"--save_to={folders.new(name, '.safetensors')}", f"--dim={_rank(rank)}", *_conv("conv_dim", conv_rank)]
    return [*words, *_error(target_error), *_precision(precision)]


def resize(
    folders: Folders,
    adapter: str,
    rank: float,
    conv_rank: float | None,
    target_error: float | None,
    name: str,
    precision: str,
) -> list[str]:
    """The command line that reduces the rank of an adapter.

    Args:
        folders: The folders of the studio.
        adapter: The name of the adapter.
        rank: The rank of linear layers and 1x1 convolutions.
        conv_rank: The rank of larger convolutions; None takes `rank`.
        target_error: The relative error to reach; None uses the rank alone.
        name: The name of the result.
        precision: The dtype of the result; empty keeps the default.

    Returns:
        The words after `lora-adapters`.

    Raises:
        StudioError: A file is outside of the folders, or the name is taken.
    """
    words = ["resize", f"--model={folders.adapter(adapter)}", f"--save_to={folders.new(name, '.safetensors')}"]
    words += [f"--new_rank={_rank(rank)}", *_conv("new_conv_rank", conv_rank)]
    return [*words, *_error(target_error), *_precision(precision)]


def convert(folders: Folders, adapter: str, form: str, rank: float | None, name: str, precision: str) -> list[str]:
    """The command line that writes an adapter in another format.

    Args:
        folders: The folders of the studio.
        adapter: The name of the adapter.
        form: The format, one of FORMATS.
        rank: Approximate deltas of all kinds by low-rank pairs of this rank; None keeps their kinds.
        name: The name of the result.
        precision: The dtype of the result; empty keeps the default.

    Returns:
        The words after `lora-adapters`.

    Raises:
        StudioError: The format is unknown, a file is outside of the folders, or the name is taken.
    """
    if form not in FORMATS:
        raise StudioError(f"{form!r:.40} is not a format; choose one of {', '.join(FORMATS)}")
    target = folders.new(name, "" if form in _FOLDERS else ".safetensors")
    words = ["convert", f"--model={folders.adapter(adapter)}", f"--save_to={target}", f"--format={form}"]
    words += ["--to=lora", f"--rank={_rank(rank)}", f"--sd_model={folders.model}"] if rank else []
    return [*words, *_precision(precision)]


def _models(folders: Folders, adapters: Sequence[str], weights: str) -> list[str]:
    """--models and --ratios. StudioError if the number of weights is not that of the adapters."""
    if not adapters:
        raise StudioError("choose the adapters to merge")
    words = ["--models", *(folders.adapter(source) for source in adapters)]
    if not weights.strip():
        return words
    try:
        ratios = [number(part) for part in weights.split(",")]
    except ValueError:
        raise StudioError(f"weights must be comma-separated numbers, not {weights:.60}") from None
    if len(ratios) != len(adapters):
        raise StudioError(f"{len(adapters)} adapters and {len(ratios)} weights: give one for each")
    return [*words, "--ratios", *(f"{ratio:g}" for ratio in ratios)]


def _precision(precision: str) -> list[str]:
    """--save_precision, or nothing for the program's default."""
    if precision == OWN:
        return []
    if precision not in PRECISIONS:
        raise StudioError(f"{precision!r:.40} is not a precision; choose one of {', '.join(PRECISIONS)}")
    return [f"--save_precision={precision}"]


def _rank(rank: float | None) -> int:
    if rank is None or rank < 1 or rank != int(rank):
        raise StudioError(f"a rank is a whole number of at least 1, not {rank}")
    return int(rank)


def _conv(flag: str, rank: float | None) -> list[str]:
    return [f"--{flag}={_rank(rank)}"] if rank else []


def _error(target: float | None) -> list[str]:
    return [f"--target_error={target:g}"] if target else []
