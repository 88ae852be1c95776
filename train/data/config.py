"""The configuration of datasets: a toml or json file, or options of the command line.

Values in [[datasets.subsets]] have the highest priority, followed by [[datasets]], [general], the command line and the
defaults.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_adapters.convert.parsing import json_value, read_text, toml_table
from lora_adapters.train.data.class_folders import class_folders
from lora_adapters.train.data.schema import check_table, check_value, rules, show
from lora_adapters.train.data_error import DataError, DataOptionError
from lora_adapters.train.options.data import (
    VAE_FACTOR,
    BucketFields,
    CaptionFields,
    DataOptions,
    ImageFields,
    read_size,
)
from lora_adapters.train.options.option import ANYWHERE, DATASET, SUBSET, option
from lora_adapters.train.options.values import did_you_mean

logger = logging.getLogger(__name__)
HUB_ONLY = ("dataset_config_name", "split", "image_column", "caption_column", "cache_dir")


def _multiplier_one(value: Any) -> float:
    if isinstance(value, bool) or value != 1:
        raise ValueError("1.0 or left out (a network multiplier per dataset is not supported)")
    return 1.0


@dataclass(kw_only=True)
class SubsetConfig(CaptionFields, ImageFields):
    """Images from one source, and options for varying the images and captions.

    The source is one of: `image_dir` alone (a folder of images with caption files), `metadata_file` (captions in a json
    or jsonl file, with paths that may be relative to `image_dir`), or `dataset_name` (a Hugging Face dataset: Hub id,
    folder of images, or folder written by save_to_disk). Without resize_interpolation, images are shrunk with "area"
    and enlarged with "lanczos". custom_attributes are stored in the metadata of the saved file.
    """

    image_dir: str | None = option(None, "folder of images", scope=SUBSET)
    metadata_file: str | None = option(None, "JSON or JSON Lines file with images and captions", scope=SUBSET)
    dataset_name: str | None = option(None, "Hugging Face dataset: Hub id or folder", scope=SUBSET)
    dataset_config_name: str | None = option(None, "configuration name of the Hugging Face dataset", scope=SUBSET)
    split: str = option("train", "split of the Hugging Face dataset", scope=SUBSET)
    image_column: str = option("image", "image column of the Hugging Face dataset", scope=SUBSET)
    caption_column: str | None = option(
        None, "caption column of the Hugging Face dataset", unset="text, if it exists", scope=SUBSET
    )
    cache_dir: str | None = option(None, "folder to cache its latents and text encoder outputs in", scope=SUBSET)
    is_reg: bool = option(False, "the images are regularisation images", scope=SUBSET)
    class_tokens: str | None = option(None, "caption of images without a caption", scope=ANYWHERE)
    num_repeats: int = option(1, "repeats of each image per epoch; 0 skips the subset", scope=ANYWHERE, at_least=0)
    custom_attributes: dict[str, Any] | None = option(
        None, "any table, stored in the metadata of the saved file", scope=ANYWHERE
    )

    @property
    def name(self) -> str:
        """The folder, file or dataset name, for messages and metadata."""
        return self.dataset_name or self.metadata_file or self.image_dir or ""


@dataclass(kw_only=True)
class DatasetConfig(BucketFields):
    """Subsets that share a resolution, buckets and a batch size. Sizes are (width, height) in pixels."""

    resolution: tuple[int, int] = option(None, "training resolution", scope=DATASET, read=read_size)
    batch_size: int = option(1, "batch size per process", scope=DATASET, at_least=1)
    min_bucket_reso: int = option(
        0, "minimum bucket side; 0: 256, or half the resolution if that is smaller", scope=DATASET, at_least=VAE_FACTOR
    )
    max_bucket_reso: int = option(
        0, "maximum bucket side; 0: 1024, or the resolution if that is larger", scope=DATASET, at_least=VAE_FACTOR
    )
    network_multiplier: float = option(1.0, "weight of the adapter; must be 1", scope=DATASET, read=_multiplier_one)
    subsets: tuple[SubsetConfig, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """All datasets of a run. `file` is None if only the command line describes them."""

    datasets: tuple[DatasetConfig, ...]
    file: Path | None = None


def load_data_config(arguments: Mapping[str, Any]) -> DataConfig:
    """Build the data configuration from options.

    Args:
        arguments: Option name -> value, as `vars()` of parsed arguments; None means not given, and options that are not
            for data are ignored. Required is `dataset_config`, or `train_data_dir`, optionally with `reg_data_dir` or
            `in_json`. Options of DataOptions are defaults for the tables of the file.

    Returns:
        The datasets with all their options.

    Raises:
        DataOptionError: The options name no data or contradict each other.
        DataError: A file cannot be read, or has an invalid value.
    """
    options = _command_line(arguments)
    file, folder = arguments.get("dataset_config"), arguments.get("train_data_dir")
    beside = [f"--{name}" for name in ("train_data_dir", "reg_data_dir", "in_json") if arguments.get(name)]
    if file and beside:
        logger.warning("%s: not used, since --dataset_config %s defines the training data", ", ".join(beside), file)
    if file:
        return _from_file(Path(file), options)
    if not folder:
        raise DataOptionError("nothing to train on: give --dataset_config or --train_data_dir")
    subsets: list[dict[str, Any]]
    if arguments.get("in_json"):
        if arguments.get("reg_data_dir"):
            raise DataOptionError("--reg_data_dir cannot be combined with --in_json: use --dataset_config for both")
        subsets = [{"image_dir": folder, "metadata_file": arguments["in_json"]}]
    else:
        subsets = class_folders(Path(folder), "--train_data_dir", is_reg=False)
        if arguments.get("reg_data_dir"):
            subsets += class_folders(Path(arguments["reg_data_dir"]), "--reg_data_dir", is_reg=True)
    return _build({"datasets": [{"subsets": subsets}]}, options, "command line", None)


def _command_line(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The data options of a command line, checked, without those that are None."""
    spelled = dict(arguments)
    if spelled.get("caption_extention") is not None:  # an old spelling that scripts still use
        spelled["caption_extension"] = spelled["caption_extention"]
    known, options = rules(SubsetConfig) | rules(DatasetConfig), {}
    for flag, declared in rules(DataOptions).items():
        if spelled.get(flag) is not None:
            name = declared.toml_name or flag
            options[name] = check_value(known[name], spelled[flag], f"--{flag}")
    return options


def _from_file(file: Path, options: dict[str, Any]) -> DataConfig:
    try:
        text = read_text(file)
        if file.suffix.lower() == ".json":
            table = json_value(text)
        elif file.suffix.lower() == ".toml":
            table = toml_table(text)
        else:
            raise DataError(f"{file}: a dataset configuration ends in .toml or .json")
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    return _build(table, options, str(file), file)


def _build(table: Any, options: dict[str, Any], source: str, file: Path | None) -> DataConfig:
    if not isinstance(table, dict):
        raise DataError(f"{source}: must contain a table with general and datasets, not {show(table)}")
    top = ("general", "datasets")
    unknown = [f"{key}{did_you_mean(key, top)}" for key in table if key not in top]
    both = (SubsetConfig, DatasetConfig)
    general = check_table(both, table.get("general", {}), "G", "general", source, unknown)
    datasets = []
    for index, entry in enumerate(_tables(table, "datasets", "datasets", source)):
        path = f"datasets[{index}]"
        own = check_table(both, {key: entry[key] for key in entry if key != "subsets"}, "D", path, source, unknown)
        outer = options | general | own
        names = rules(SubsetConfig)
        inherited = {key: value for key, value in outer.items() if key in names}
        subsets: list[SubsetConfig] = []
        for number, part in enumerate(_tables(entry, "subsets", f"{path}.subsets", source)):
            where = f"{path}.subsets[{number}]"
            subset = SubsetConfig(**inherited | check_table(both, part, "S", where, source, unknown))
            _check_source(subset, part, where, source)
            subsets.append(subset)
        values = {key: value for key, value in outer.items() if key not in names}
        datasets.append(_checked_sizes(DatasetConfig(**values, subsets=tuple(subsets)), path, source))
    if unknown:
        logger.warning("%s: not options of a dataset, and ignored: %s", source, ", ".join(unknown))
    return DataConfig(tuple(datasets), file)


def _tables(table: dict[str, Any], key: str, path: str, source: str) -> list[dict[str, Any]]:
    value = table.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        problem = "is missing" if value is None else f"must be a list of at least one table, not {show(value)}"
        raise DataError(f"{source}: {path} {problem}")
    return value


def _check_source(subset: SubsetConfig, own: Mapping[str, Any], path: str, source: str) -> None:
    """Check that a subset has exactly one source of images, and no options for another kind of source."""
    if subset.dataset_name and (subset.image_dir or subset.metadata_file):
        other = "image_dir" if subset.image_dir else "metadata_file"
        raise DataError(f"{source}: {path} has both dataset_name and {other}")
    if not (subset.image_dir or subset.metadata_file or subset.dataset_name):
        raise DataError(f"{source}: {path} names no images: give image_dir, metadata_file or dataset_name")
    if not subset.caption_separator:
        raise DataError(f"{source}: {path}.caption_separator must not be empty")
    if subset.alpha_mask and subset.conditioning_data_dir:
        raise DataError(f"{source}: {path} has two masks, alpha_mask and conditioning_data_dir: leave one out")
    if subset.dataset_name:
        for name in ("conditioning_data_dir", "cache_info"):
            if getattr(subset, name):
                raise DataError(f"{source}: {path}.{name} is for folders and is not supported with dataset_name")
    else:
        for name in HUB_ONLY:
            if name in own:
                raise DataError(f"{source}: {path}.{name} needs dataset_name, which is not given")


def _checked_sizes(dataset: DatasetConfig, path: str, source: str) -> DatasetConfig:
    if dataset.resolution is None:
        raise DataError(f"{source}: {path} has no resolution: give it there, in [general] or as --resolution")
    if dataset.validation_split == 1:
        raise DataError(f"{source}: {path}.validation_split must be below 1: nothing would be left to train on")
    width, height = dataset.resolution
    if not dataset.enable_bucket:
        if width % VAE_FACTOR or height % VAE_FACTOR:
            raise DataError(f"{source}: {path}.resolution {width}x{height} must be a multiple of {VAE_FACTOR}")
        return dataset
    steps = dataset.bucket_reso_steps
    if steps % VAE_FACTOR:
        raise DataError(f"{source}: {path}.bucket_reso_steps must be a multiple of {VAE_FACTOR}, not {steps}")
    if min(width, height) < steps:
        raise DataError(
            f"{source}: {path}.bucket_reso_steps {steps} is larger than the resolution {width}x{height}: lower it "
            f"(a multiple of {VAE_FACTOR})"
        )
    if dataset.min_bucket_reso > min(width, height):
        raise DataError(f"{source}: {path}.min_bucket_reso {dataset.min_bucket_reso} is larger than the resolution")
    if dataset.max_bucket_reso and dataset.max_bucket_reso < max(width, height):
        raise DataError(f"{source}: {path}.max_bucket_reso {dataset.max_bucket_reso} is smaller than the resolution")
    return dataset
