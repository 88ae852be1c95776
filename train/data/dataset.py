"""All images and captions of a run, as batches that depend only on the seed and the epoch.

Everything random (order, flips, crops, captions) is derived from (seed, epoch, number of the entry), independently of
global random state, workers, processes and resuming.
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
    """The training images of a data configuration. `validation` has the held-out images, if there are any.

    Args:
        config: The configuration from `load_data_config`.
        seed: The seed of the run.
        prior_loss_weight: The loss weight of regularisation images.
        persistent_workers: Whether loading processes stay alive between epochs.
        pin_memory: Whether batches are in page-locked memory.
        images: The images, if they are already loaded. None reads the header of each image of the config.

    Raises:
        DataError: There is nothing to train on.
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
        """The number of training images in an epoch, with repeats and without regularisation images."""
        return self.images.count(regularisation=False)

    @property
    def num_regularisation(self) -> int:
        """The number of regularisation images in an epoch, repeated to match the training images."""
        return self.images.count(regularisation=True)

    @property
    def trigger_words(self) -> list[str]:
        """The class tokens that are used as captions of images without a caption."""
        used = (loaded for loaded in self.images.subsets if not loaded.config.is_reg and loaded.without_caption)
        return list(dict.fromkeys(loaded.config.class_tokens for loaded in used if loaded.config.class_tokens))

    @property
    def has_masks(self) -> bool:
        """Whether any subset has masks (alpha_mask or conditioning_data_dir)."""
        return any(subset.alpha_mask or subset.conditioning_data_dir for subset in self._subsets())

    @property
    def needs_max_train_steps(self) -> bool:
        """Whether set_schedule must be called because an option is a share of the run (token_warmup_step below 1)."""
        return any(0 < subset.token_warmup_step < 1 for subset in self._subsets())

    def set_schedule(self, max_train_steps: int, gradient_accumulation_steps: int = 1) -> None:
        """Set the length of the run, for token_warmup_step; call it before batches()."""
        self._reader.max_train_steps = max_train_steps
        self._reader.accumulation = gradient_accumulation_steps
        self._loader.restart()

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """The number of batches that each of `world_size` processes gets in an epoch."""
        return self._reader.batch_count(world_size)

    def batches(
        self, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """The batches of an epoch for one process.

        w processes with batch size b share the batches of one process with batch size w * b. If the last batch of a
        bucket does not divide evenly, loss_weights make the gradients equal to those of one process (see
        `batches.share`). Validation data is the same in every epoch. An image that cannot be decoded is replaced by
        another one of its bucket, and recorded in `damaged`.

        Args:
            epoch: The number of the epoch, from 0.
            start: The index of the first batch; earlier ones are not loaded.
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
        """Encode every image once, including the validation data; batches then have latents instead of images.

        Each posterior is sampled once, with noise that depends only on the seed and the image. Images that cannot be
        decoded are replaced, with a warning; see `batches`. With `to_disk` each process writes a part of the files, so
        all processes must be synchronised before the first batch. In memory every process encodes everything.

        Args:
            vae: The VAE, on `device`.
            files: The names and content of the family's files.
            to_disk: Keep latents for later runs, in .npz files next to the images (`cache_files`).
            batch_size: The number of images that are encoded together.
            device: The device of the VAE.
            check: Whether to check existing files; False uses them unchecked.
            rank: The number of this process.
            world_size: The number of processes that train.

        Raises:
            DataError: A subset has color_aug or random_crop.
        """
        for subset in self._subsets():
            for name in ("color_aug", "random_crop"):
                if getattr(subset, name):
                    raise DataError(f"latents cannot be cached with {name} (of {subset.name}): leave one of them out")
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
        """Encode every caption once, including the validation data; batches then have `text`.

        Args:
            encode: Returns name -> tensor (captions, ...) for captions, always with the same names and shapes: those of
                the family's `to_cache`, so that kohya's scripts can read the files.
            to_disk: Keep the outputs for later runs, in .npz files next to the images.
            batch_size: The number of captions that are encoded together.
            encoder: How the outputs are made (model, clip_skip, length); files with another value are replaced.
            ending: The end of the files' names.
            check: Whether to check existing files; False uses them unchecked.
            rank: The number of this process.
            world_size: The number of processes that train.

        Raises:
            DataError: An option varies the captions over time.
        """
        for subset in self._subsets():
            varying = varying_options(subset)
            if varying:
                raise DataError(f"text-encoder outputs cannot be cached with {varying[0]} (of {subset.name})")
        for data in self._with_validation():
            data._reader.text = encode_text(
                data.images, encode, to_disk, batch_size, encoder, check, rank, world_size, ending
            )
            data._loader.restart()

    @property
    def damaged(self) -> dict[str, str]:
        """Images that this process could not use so far, including validation data: name -> reason."""
        return {name: reason for data in self._with_validation() for name, reason in data._loader.damaged.items()}

    def close(self) -> None:
        """End the loading processes. Iterators from `batches` end; `batches` can be called again."""
        for data in self._with_validation():
            data._loader.close()

    def summary(self) -> str:
        """Images, repeats and buckets of each subset, as lines of text."""
        return summary_text(self.images, self.validation.images if self.validation else None)

    def metadata(self, world_size: int = 1) -> dict[str, str]:
        """The ss_* metadata entries about data, in kohya's format."""
        return kohya_metadata(self.images, self.config, world_size)

    def _subsets(self) -> list[SubsetConfig]:
        return [loaded.config for loaded in self.images.subsets]

    def _with_validation(self) -> list["TrainingData"]:
        return [self, self.validation] if self.validation else [self]
