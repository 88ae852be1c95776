"""Summarises the training data, as text and as metadata for the saved file."""

import json
import os
from collections import Counter
from typing import Any

from lora_adapters.train.data.buckets import Buckets
from lora_adapters.train.data.config import DataConfig, DatasetConfig, SubsetConfig
from lora_adapters.train.data.image_set import ImageSet, LoadedSubset


def summary_text(training: ImageSet, validation: ImageSet | None) -> str:
    """One line for each dataset, subset and bucket, then totals."""
    lines = []
    for number, dataset in enumerate(training.datasets):
        lines.append(f"dataset {number}: {_shape(dataset)}, batch size {dataset.batch_size}")
        for loaded in (loaded for loaded in training.subsets if loaded.dataset == number):
            config = loaded.config
            kind = ", regularisation" if config.is_reg else ""
            lines.append(
                f"  {config.name}{kind}: {len(loaded.images)} images, {config.num_repeats} repeats{_gaps(loaded)}"
            )
        for group, (owner, bucket) in zip(training.groups, training.group_buckets, strict=True):
            if owner == number:
                lines.append(f"  {bucket[0]}x{bucket[1]}: {len(group.entries)}")
    held_out = len(validation.entries) if validation else 0
    counts = training.count(regularisation=False), training.count(regularisation=True)
    lines.append(f"an epoch: {counts[0]} training images with repeats, {counts[1]} for regularisation")
    lines.append(f"validation: {held_out} images")
    return "\n".join(lines)


def kohya_metadata(images: ImageSet, config: DataConfig, world_size: int) -> dict[str, str]:
    """The ss_* metadata entries about data, as strings: nested for a dataset file, flat for command-line folders."""
    shared: dict[str, Any] = {
        "ss_num_train_images": images.count(regularisation=False),
        "ss_num_reg_images": images.count(regularisation=True),
    }
    if config.file is not None:
        entries = [_dataset_entry(images, number) for number in range(len(images.datasets))]
        tags: dict[str, Any] = {}
        for number in range(len(images.datasets)):
            tags = tag_frequency(images, number) | tags
        shared["ss_datasets"] = json.dumps(entries)
        shared["ss_tag_frequency"] = json.dumps(tags)
        shared["ss_dataset_dirs"] = json.dumps(_folders(images.subsets, regularisation=False))
    else:
        shared |= _flat(images, world_size)
    return {name: str(value) for name, value in shared.items()}


def tag_frequency(images: ImageSet, dataset: int) -> dict[str, dict[str, int]]:
    """Name of a folder, file or dataset -> comma-separated tag of its captions -> number of occurrences."""
    frequency: dict[str, Counter[str]] = {}
    for loaded in (loaded for loaded in images.subsets if loaded.dataset == dataset):
        counter = frequency.setdefault(_base_name(loaded.config), Counter())
        for image in loaded.images:
            counter.update(tag.strip().lower() for tag in image.caption.split(",") if tag.strip())
    return {name: dict(counter) for name, counter in frequency.items()}


def bucket_info(images: ImageSet, dataset: int) -> dict[str, Any] | None:
    """Buckets with their number of images (with repeats), and the mean aspect error; None without buckets."""
    if not images.datasets[dataset].enable_bucket:
        return None
    buckets = Buckets(images.datasets[dataset])
    mine = [
        (bucket, len(group.entries))
        for group, (owner, bucket) in zip(images.groups, images.group_buckets, strict=True)
        if owner == dataset
    ]
    errors = [buckets.aspect_error(image.origin.size) for image in images.images if image.dataset == dataset]
    return {
        "buckets": {index: {"resolution": bucket, "count": count} for index, (bucket, count) in enumerate(mine)},
        "mean_img_ar_error": sum(errors) / len(errors) if errors else 0,
    }


def _dataset_entry(images: ImageSet, number: int) -> dict[str, Any]:
    dataset, buckets = images.datasets[number], Buckets(images.datasets[number])
    mine = [loaded for loaded in images.subsets if loaded.dataset == number]
    return {
        "is_dreambooth": all(not loaded.config.metadata_file for loaded in mine),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": images.dataset_count(number, regularisation=False),
        "num_reg_images": images.dataset_count(number, regularisation=True),
        "resolution": dataset.resolution,
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": buckets.smallest if dataset.enable_bucket else None,
        "max_bucket_reso": buckets.largest if dataset.enable_bucket else None,
        "tag_frequency": tag_frequency(images, number),
        "bucket_info": bucket_info(images, number),
        "subsets": [_subset_entry(loaded) for loaded in mine],
    }


def _subset_entry(loaded: LoadedSubset) -> dict[str, Any]:
    config = loaded.config
    names = (
        "num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens",
        "keep_tokens_separator", "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix",
        "resize_interpolation",
    )  # fmt: skip
    entry: dict[str, Any] = {"img_count": len(loaded.images)} | {name: getattr(config, name) for name in names}
    if config.image_dir:
        entry["image_dir"] = _last_part(config.image_dir)
    if config.metadata_file:
        entry["metadata_file"] = _last_part(config.metadata_file)
    else:
        entry |= {"class_tokens": config.class_tokens, "is_reg": config.is_reg}
    if config.dataset_name:
        entry |= {"dataset_name": _base_name(config), "split": config.split}
    if config.custom_attributes is not None:
        entry["custom_attributes"] = config.custom_attributes
    return entry


def _folders(subsets: list[LoadedSubset], *, regularisation: bool) -> dict[str, dict[str, int]]:
    """Folder name -> repeats and number of images; names that occur more than once get a number."""
    folders: dict[str, dict[str, int]] = {}
    for loaded in (loaded for loaded in subsets if loaded.config.is_reg == regularisation):
        base = name = _base_name(loaded.config)
        count = 2
        while name in folders:
            name, count = f"{base} ({count})", count + 1
        folders[name] = {"n_repeats": loaded.config.num_repeats, "img_count": len(loaded.images)}
    return folders


def _flat(images: ImageSet, world_size: int) -> dict[str, Any]:
    """The flat entries for command-line folders: one dataset whose subsets share their options."""
    dataset, subset, buckets = images.datasets[0], images.subsets[0].config, Buckets(images.datasets[0])
    return {
        "ss_batch_size_per_device": dataset.batch_size,
        "ss_total_batch_size": dataset.batch_size * world_size,
        "ss_resolution": dataset.resolution,
        "ss_color_aug": subset.color_aug,
        "ss_flip_aug": subset.flip_aug,
        "ss_random_crop": subset.random_crop,
        "ss_shuffle_caption": subset.shuffle_caption,
        "ss_enable_bucket": dataset.enable_bucket,
        "ss_bucket_no_upscale": dataset.bucket_no_upscale,
        "ss_min_bucket_reso": buckets.smallest if dataset.enable_bucket else None,
        "ss_max_bucket_reso": buckets.largest if dataset.enable_bucket else None,
        "ss_keep_tokens": subset.keep_tokens,
        "ss_dataset_dirs": json.dumps(_folders(images.subsets, regularisation=False)),
        "ss_reg_dataset_dirs": json.dumps(_folders(images.subsets, regularisation=True)),
        "ss_tag_frequency": json.dumps(tag_frequency(images, 0)),
        "ss_bucket_info": json.dumps(bucket_info(images, 0)),
    }


def _base_name(config: SubsetConfig) -> str:
    """A short name for metadata: the full Hub id, or the last part of a path."""
    name = config.dataset_name
    return name if name and not os.path.exists(name) else _last_part(config.name)


def _last_part(path: str) -> str:
    return os.path.basename(os.path.normpath(path))


def _shape(dataset: DatasetConfig) -> str:
    size = f"{dataset.resolution[0]}x{dataset.resolution[1]}"
    if not dataset.enable_bucket:
        return size
    buckets = Buckets(dataset)
    limits = "no enlarging" if buckets.no_upscale else f"sides {buckets.smallest} to {buckets.largest}"
    return f"{size}, buckets with {limits} in steps of {buckets.steps}"


def _gaps(loaded: LoadedSubset) -> str:
    skipped = f", {loaded.skipped} unreadable" if loaded.skipped else ""
    return skipped + (f", {loaded.without_caption} without a caption" if loaded.without_caption else "")
