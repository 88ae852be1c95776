"""Options: images, captions, buckets, caches. With --dataset_config they are defaults for the file's tables.

Options for both the command line and dataset files are declared once, in the classes that end in Fields. The classes
of command-line options and of the tables of a dataset file (train/data/config.py) inherit them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora_adapters.train.interpolation import TRAINING
from lora_adapters.train.options.model import ZERO
from lora_adapters.train.options.option import ANYWHERE, DATASET, SUBSET, Inert, option

_FACE_CROP = "cropping around faces is not supported; crop the images beforehand"
VAE_FACTOR = 8  # pixels per latent of every Stable Diffusion VAE


def read_size(value: Any) -> tuple[int, int]:
    """(width, height) from 512, "512", "512,768" or [512, 768]."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    whole = [part for part in parts if not isinstance(part, (bool, float))]
    try:
        numbers = [int(part) for part in whole]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2) or len(numbers) != len(parts) or min(numbers) < VAE_FACTOR:
        raise ValueError(f'a size of at least {VAE_FACTOR}: one integer, [width, height] or "width,height"')
    return numbers[0], numbers[-1]


def _suffix(value: Any) -> str:
    if not isinstance(value, str) or not value.strip(".") or "/" in value or "\\" in value:
        raise ValueError('a file name ending, such as ".txt"')
    return value if value.startswith(".") else f".{value}"


def _face_crop_not_supported(value: Any) -> None:
    if value is not None:
        raise ValueError(f"left out ({_FACE_CROP})")


@dataclass(kw_only=True)
class BucketFields:
    """Image sizes, for the command line and [[datasets]]."""

    enable_bucket: bool = option(False, "sort images into buckets by aspect ratio", scope=DATASET)
    bucket_reso_steps: int = option(64, "bucket sides are multiples of this", scope=DATASET, at_least=VAE_FACTOR)
    bucket_no_upscale: bool = option(False, "never upscale an image", scope=DATASET)
    validation_split: float = option(
        0.0, "share of the images to hold out for validation", scope=DATASET, at_least=0, at_most=1, metadata=True
    )
    validation_seed: int | None = option(
        None, "seed for choosing the validation images", unset="--seed", scope=DATASET, metadata=True
    )


@dataclass(kw_only=True)
class CaptionFields:
    """Reading and variation of captions, for the command line and [[datasets.subsets]]."""

    caption_extension: str = option(".caption", "extension of caption files", scope=ANYWHERE, read=_suffix)
    caption_separator: str = option(",", "separator between tags", scope=ANYWHERE)
    shuffle_caption: bool = option(False, "shuffle the tags of each caption", scope=ANYWHERE)
    keep_tokens: int = option(0, "keep the first n tags in place", scope=ANYWHERE, at_least=0)
    keep_tokens_separator: str | None = option("", "keep the tags before this separator in place", scope=ANYWHERE)
    secondary_separator: str | None = option(
        None, "separator within a tag; replaced by --caption_separator after shuffling", scope=ANYWHERE
    )
    enable_wildcard: bool = option(
        False, "choose at random among {a|b}, and among the lines of a caption file", scope=ANYWHERE
    )
    caption_prefix: str | None = option(None, "text to add before each caption", scope=ANYWHERE)
    caption_suffix: str | None = option(None, "text to add after each caption", scope=ANYWHERE)
    caption_dropout_rate: float = option(
        0.0,
        "probability of dropping a caption (leaving it empty)",
        scope=ANYWHERE,
        at_least=0,
        at_most=1,
        metadata=True,
    )
    caption_dropout_every_n_epochs: int = option(
        0, "drop all captions every n epochs", scope=ANYWHERE, at_least=0, metadata=True
    )
    caption_tag_dropout_rate: float = option(
        0.0, "probability of dropping a tag", scope=ANYWHERE, at_least=0, at_most=1, metadata=True
    )
    token_warmup_min: int = option(1, "number of tags at the start of token warmup", scope=ANYWHERE, at_least=1)
    token_warmup_step: float = option(
        0.0, "number of steps until all tags are used; below 1, a share of all steps", scope=ANYWHERE, at_least=0
    )


@dataclass(kw_only=True)
class ImageFields:
    """Variation of images, for the command line and [[datasets.subsets]]."""

    flip_aug: bool = option(False, "flip images horizontally at random", scope=ANYWHERE)
    color_aug: bool = option(False, "vary colours at random", scope=ANYWHERE)
    random_crop: bool = option(False, "crop at random positions", scope=ANYWHERE)
    face_crop_aug_range: str | None = option(
        None,
        "crop around faces, with a margin factor in this range: 1.0,2.0",
        scope=ANYWHERE,
        read=_face_crop_not_supported,
        unsupported=_FACE_CROP,
        metadata=True,
    )
    resize_interpolation: str | None = option(
        None,
        "interpolation for resizing images",
        unset="area to shrink, lanczos to enlarge",
        choices=TRAINING,
        scope=ANYWHERE,
        metadata=True,
    )
    alpha_mask: bool = option(False, "use the images' alpha channels as masks", scope=SUBSET)
    conditioning_data_dir: str | None = option(
        None, "folder of masks with the same file names as the images", scope=SUBSET
    )
    cache_info: bool = option(False, "cache the list of images and captions on disk", scope=ANYWHERE)


@dataclass(kw_only=True)
class SourceOptions:
    """Sources of data."""

    dataset_config: str | None = option(None, "TOML or JSON file that describes the training data")
    train_data_dir: str | None = option(None, "folder with image folders named `<repeats>_<class>`")
    reg_data_dir: str | None = option(None, "the same as --train_data_dir, for regularisation images")
    in_json: str | None = option(None, "JSON metadata file with images and captions")
    dataset_repeats: int = option(
        1, "repeats of each image of --in_json per epoch", scope=ANYWHERE, toml_name="num_repeats", at_least=0
    )
    dataset_class: str | None = option(
        None,
        "custom dataset class (package.module.Class)",
        unsupported="other dataset classes are not supported; describe the data in --dataset_config",
    )
    debug_dataset: bool = option(
        False,
        "show the dataset instead of training",
        unsupported="showing images is not supported; use --dry_run for buckets, steps and captions",
    )
    resolution: str | None = option(None, "training resolution: 512, or width,height", scope=DATASET)
    train_batch_size: int = option(1, "batch size per process", scope=DATASET, toml_name="batch_size", at_least=1)


@dataclass(kw_only=True)
class DatasetOptions(BucketFields, SourceOptions):
    """Sources of data, image sizes and batches."""

    title: ClassVar[str] = "data"
    min_bucket_reso: int = option(256, "minimum side length of a bucket", scope=DATASET, at_least=VAE_FACTOR)
    max_bucket_reso: int = option(1024, "maximum side length of a bucket", scope=DATASET, at_least=VAE_FACTOR)
    validate_every_n_steps: int | None = option(
        None, "compute the validation loss every n steps", at_least=1, inert=(ZERO,), metadata=True
    )
    validate_every_n_epochs: int | None = option(
        None, "compute the validation loss every n epochs", unset="1", at_least=1, inert=(ZERO,), metadata=True
    )
    max_validation_steps: int | None = option(
        None, "maximum number of validation batches", unset="all", at_least=1, inert=(ZERO,), metadata=True
    )


@dataclass(kw_only=True)
class CaptionOptions(CaptionFields):
    """Captions."""

    title: ClassVar[str] = "captions"
    caption_extention: str | None = option(None, "older spelling of --caption_extension", unset="--caption_extension")


@dataclass(kw_only=True)
class ImageOptions(ImageFields):
    """Images and caches."""

    title: ClassVar[str] = "images and caches"
    cache_latents: bool = option(False, "encode the images once, before training, and cache the latents")
    cache_latents_to_disk: bool = option(False, "cache latents on disk, next to the images")
    vae_batch_size: int = option(
        1, "batch size for caching latents", at_least=1, inert=(Inert(lambda value, _: value == 0, "0 is taken as 1"),)
    )
    skip_cache_check: bool = option(False, "use caches on disk without checking them")
    cache_text_encoder_outputs: bool = option(False, "cache text encoder outputs (only if no text encoder is trained)")
    cache_text_encoder_outputs_to_disk: bool = option(False, "cache text encoder outputs on disk, next to the images")


@dataclass(kw_only=True)
class DataOptions(DatasetOptions, CaptionOptions, ImageOptions):
    """All options for data."""
