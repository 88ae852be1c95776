"""All images and captions of a run, as batches that depend on the seed and the epoch alone.

Everything random (order, flips, crops, captions) is derived from (seed, epoch, number of the entry): global random
state, workers, processes and the place where a run was resumed have no part in it.
"""

from collections.abc import Callable, Iterator

import torch

from lora_adapters.train.data.batches import Batch
from lora_adapters.train.data.cache_files import TEXT_ENDING, LatentFiles
from lora_adapters.train.data.cache_fill import encode_latents, encode_text
from lora_adapters.train.data.captions import varying_options
from lora_adapters.train.data.config import DataConfig, SubsetConfig
from lora_adapters.train.data.epoch_loader import EpochLoader
from lora_adapters.train.data.image_set import ImageSet, load_images
from lora_adapters.train.data.loader import BatchReader
from lora_adapters.train.data.summary import kohya_metadata, summary_text
from lora_adapters.train.data_error import DataError

Encode = Callable[[list[str]], dict[str, torch.Tensor]]


class TrainingData:
    """The training images of `config`, with `validation` split off if it asks for that.

    Args:
        config: what `load_data_config` returns.
        seed: the run's.
        prior_loss_weight: the loss weight of regularisation images.
        persistent_workers: whether loading processes stay alive between epochs.
        pin_memory: whether batches are in page-locked memory.
        images: used in place of the config's; without them the header of each image of the config is read.

    Raises:
        DataError: if there is nothing to train on.
    """

    validation: "TrainingData | None"

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        prior_loss_weight: float = 1.0,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        images: ImageSet | None = None,
    ) -> None:
        held_out = None
        if images is None:
            images, held_out = load_images(config, seed)
        self.config, self.images, self.validation = config, images, None
        self._reader = BatchReader(images, seed, prior_loss_weight)
        self._loader = EpochLoader(self._reader, persistent_workers, pin_memory)
        if held_out is not None:
            self.validation = TrainingData(
                config, seed=seed, persistent_workers=persistent_workers, pin_memory=pin_memory, images=held_out
            )

    @property
    def num_images(self) -> int:
        """Training images with repeats, as an epoch sees them, without regularisation images."""
        return self.images.count(regularisation=False)

    @property
    def num_regularisation(self) -> int:
        """Regularisation images as an epoch sees them, repeated to match the training images."""
        return self.images.count(regularisation=True)

    @property
    def trigger_words(self) -> list[str]:
        """The class tokens that were used as captions of images without one."""
        used = (loaded for loaded in self.images.subsets if not loaded.config.is_reg and loaded.without_caption)
        return list(dict.fromkeys(loaded.config.class_tokens for loaded in used if loaded.config.class_tokens))

    @property
    def has_masks(self) -> bool:
        """Whether any image has a mask (alpha_mask or conditioning_data_dir), so that batches do."""
        return any(subset.alpha_mask or subset.conditioning_data_dir for subset in self._subsets())

    @property
    def needs_max_train_steps(self) -> bool:
        """Whether an option counts in parts of the run (token_warmup_step below 1), so set_schedule must be called."""
        return any(0 < subset.token_warmup_step < 1 for subset in self._subsets())

    def set_schedule(self, max_train_steps: int, gradient_accumulation_steps: int = 1) -> None:
        """Tell how long the run is, for token_warmup_step; call it before batches()."""
        self._reader.max_train_steps = max_train_steps
        self._reader.accumulation = gradient_accumulation_steps
        self._loader.restart()

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """How many batches each of `world_size` processes gets in every epoch."""
        return self._reader.batch_count(world_size)

    def batches(
        self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """The batches of an epoch for one process.

        w processes with batch size b get the batches of one process with batch size w * b, each its part. If the last
        batch of a bucket does not divide evenly, loss_weights keep the gradients those of one process (see
        `batches.share`). Validation data is the same in every epoch. An image that cannot be decoded is replaced by
        another one of its bucket, and noted in `damaged`.

        Args:
            epoch: The number of the epoch, from 0.
            start: The number of the first batch; earlier ones are not loaded.
            rank: The number of this process, from 0.
            world_size: The number of processes that train.
            workers: The number of loading processes of this process; 0 loads in this process.

        Yields:
            The batches in order.

        Raises:
            DataError: No image of a bucket can be decoded.
        """
        if self.needs_max_train_steps and self._reader.max_train_steps is None:
            raise DataError("token_warmup_step below 1 is a share of max_train_steps: call set_schedule first")
        return self._loader.batches(epoch, start, rank, world_size, workers)

    def cache_latents(
        self,
        vae: torch.nn.Module,
        files: LatentFiles,
        *,
        to_disk: bool = False,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        check: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Encode every image once, of the validation data too; batches then carry latents and no images.

        Each posterior is sampled once, from noise that depends on the seed and the image only. Images that cannot be
        decoded are left out, with a warning that counts and names them; see `batches`. On disk, each of several
        processes writes its part, so let all wait for each other before the first batch. In memory every process
        encodes everything.

        Args:
            vae: The VAE, on `device`.
            files: The names and the layout of the family's files.
            to_disk: Keep latents for later runs, in .npz files beside the images (`cache_files`).
            batch_size: The number of images that are encoded together.
            device: The device of the VAE.
            check: Check existing files; False uses them unchecked.
            rank: The number of this process.
            world_size: The number of processes that train.

        Raises:
            DataError: The data has color_aug or random_crop.
        """
        for subset in self._subsets():
            for name in ("color_aug", "random_crop"):
                if getattr(subset, name):
                    raise DataError(f"cached latents exclude {name} (of {subset.name}): leave one of them out")
        for data in self._with_validation():
            data._reader.latents = encode_latents(
                data.images, vae, self._reader.seed, to_disk, batch_size, device, files, check, rank, world_size
            )
            data._loader.restart()

    def cache_text(
        self,
        encode: Encode,
        *,
        to_disk: bool = False,
        batch_size: int = 8,
        encoder: str = "",
        ending: str = TEXT_ENDING,
        check: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Encode every caption once, of the validation data too; batches then carry `text`.

        Args:
            encode: Returns tensors of shape (captions, ...) for captions, with the same names and shapes each time:
                those of the family's `to_cache`, so that kohya's scripts read the files.
            to_disk: Keep the outputs for later runs, in .npz files beside the images.
            batch_size: The number of captions that are encoded together.
            encoder: How the outputs are made (model, clip_skip, length); files with another value are replaced.
            ending: The end of the files' names.
            check: Check existing files; False uses them unchecked.
            rank: The number of this process.
            world_size: The number of processes that train.

        Raises:
            DataError: Options change the captions in each epoch.
        """
        for subset in self._subsets():
            varying = varying_options(subset)
            if varying:
                raise DataError(f"cached text-encoder outputs exclude {varying[0]} (of {subset.name})")
        for data in self._with_validation():
            data._reader.text = encode_text(
                data.images, encode, to_disk, batch_size, encoder, check, rank, world_size, ending
            )
            data._loader.restart()

    @property
    def damaged(self) -> dict[str, str]:
        """What could not be used so far, in this process, of the validation data too: the reason, by name."""
        return {name: reason for data in self._with_validation() for name, reason in data._loader.damaged.items()}

    def close(self) -> None:
        """End the loading processes. Iterators from `batches` end, new ones can be made."""
        for data in self._with_validation():
            data._loader.close()

    def summary(self) -> str:
        """Counts per subset, buckets and repeats, as lines of text."""
        return summary_text(self.images, self.validation.images if self.validation else None)

    def metadata(self, world_size: int = 1) -> dict[str, str]:
        """The ss_* metadata entries of a saved adapter that concern data, in kohya's form."""
        return kohya_metadata(self.images, self.config, world_size)

    def _subsets(self) -> list[SubsetConfig]:
        return [loaded.config for loaded in self.images.subsets]

    def _with_validation(self) -> list["TrainingData"]:
        return [self, self.validation] if self.validation else [self]
