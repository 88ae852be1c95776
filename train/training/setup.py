"""Creates the parts of a training run from the settings: models, data, adapter, optimizer, schedule and loss."""

import contextlib
import datetime
import functools
import logging
import math
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from lora_adapters.component_rates import scale_component_rates
from lora_adapters.convert.portable import forbidden
from lora_adapters.train.data.batches import Batch
from lora_adapters.train.data.config import load_data_config
from lora_adapters.train.data.dataset import TrainingData
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.models.base import (
    BaseModels,
    check_path,
    family_on_disk,
    load_base_models,
)
from lora_adapters.train.models.block_swap import MainMemory, swap_blocks
from lora_adapters.train.models.choices import ModelChoices
from lora_adapters.train.models.memory import (
    apply_memory_options,
    check_machine,
    keep_in_float8,
    set_training,
    weight_type,
)
from lora_adapters.train.models.quantised import quantise
from lora_adapters.train.objective.losses import LossOptions
from lora_adapters.train.objective.noise import NoiseOptions
from lora_adapters.train.objective.step_loss import Denoiser, StepLoss, StepOptions
from lora_adapters.train.options.inert import leave_out_inert
from lora_adapters.train.options.settings import Settings, check_ranges
from lora_adapters.train.options.unsupported import refuse
from lora_adapters.train.options.values import required
from lora_adapters.train.training import adapters
from lora_adapters.train.training.average import WeightAverage, check_average
from lora_adapters.train.training.caching import cache
from lora_adapters.train.training.checkpoints import load_position
from lora_adapters.train.training.fitting import check_base_model, check_known_family, noise_schedule
from lora_adapters.train.training.lr_schedules import check_schedule, create_schedule
from lora_adapters.train.training.optimizers import check_sortable, create_optimizer, optimizer_class, optimizer_name
from lora_adapters.train.training.samples import Prompt, check_samplers_fit, check_samples, read_prompts, wants_samples
from lora_adapters.train.training.trackers import check_trackers, tracker_names
from lora_adapters.train.training.uploads import Uploads, check_uploads, state_folder
from lora_adapters.types.dylora.rank_controller import RankController, controllers, sorting_step

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that is ready to train. `denoiser` is the module `plain`, wrapped by accelerate."""

    settings: Settings
    accelerator: Accelerator
    models: BaseModels
    data: TrainingData
    trained: dict[str, Any]
    plain: Denoiser
    denoiser: Any
    loss: StepLoss
    optimizer: Any
    schedule: Any
    steps: int
    epochs: int
    metadata: dict[str, str] = field(default_factory=dict)
    uploads: Uploads | None = None
    prompts: list[Prompt] = field(default_factory=list)
    layers: list[Any] = field(default_factory=list)
    samples: Path | None = None  # the file of the latest sample images

    @property
    def batches_per_epoch(self) -> int:
        return self.data.batches_per_epoch(self.accelerator.num_processes)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.settings.gradient_accumulation_steps)

    @property
    def output(self) -> Path:
        return Path(required(self.settings.output_dir, "--output_dir"))

    @property
    def seed(self) -> int:
        """The seed of the run: --seed, that of the resumed run, or a random one."""
        return required(self.settings.seed, "--seed")

    @property
    def save_every_n_epochs(self) -> int | None:
        """--save_every_n_epochs, or the interval that --save_n_epoch_ratio implies."""
        ratio = self.settings.save_n_epoch_ratio
        return max(1, self.epochs // ratio) if ratio else self.settings.save_every_n_epochs

    @functools.cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters, cached because a U-Net has thousands of modules to search."""
        return [p for p in self.plain.parameters() if p.requires_grad]

    @functools.cached_property
    def dials(self) -> list[RankController]:
        """The rank controllers of DyLoRA layers, cached for the same reason."""
        return controllers(list(self.trained.values()))

    @functools.cached_property
    def sort_step(self) -> int | None:
        """The step before which DyLoRA's components are sorted; None if they are not sorted."""
        share = max((dial.sort_at for dial in self.dials), default=0.0)
        return sorting_step(share, self.steps) if share else None

    def tell_step(self, step: int, number: int, batch: Batch) -> None:
        """Announce the next batch to the rank controllers: DyLoRA's ranks depend on step, batch and seed."""
        part = step * self.settings.gradient_accumulation_steps + number
        samples = range(batch.start, batch.start + len(batch.captions))
        for dial in self.dials:
            if self.sort_step is not None:
                dial.nested_from = self.sort_step * self.settings.gradient_accumulation_steps
            dial.set_step(part, self.seed, samples, batch.total)

    @functools.cached_property
    def average(self) -> WeightAverage | None:
        """The moving average of the trained parameters; None without --ema_decay."""
        decay = self.settings.ema_decay
        return WeightAverage(self.parameters, decay) if decay else None

    def averaged(self) -> contextlib.AbstractContextManager:
        """A context in which the parameters hold their moving average, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def training_mode(self, training: bool = True) -> None:
        """Switch the trained models to training or evaluation mode."""
        text = bool(adapters.text_components(self.trained))
        set_training(self.models, training, text)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """A context for one batch: gradients are synchronised between processes only in the last batch of a step."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.denoiser)

    def offloading(self) -> contextlib.AbstractContextManager:
        """A context that keeps saved activations in CPU memory if --cpu_offload_checkpointing is set."""
        if not self.settings.cpu_offload_checkpointing:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.accelerator.device.type == "cuda")


def check(settings: Settings) -> None:
    """Check all settings that can be checked before anything is loaded.

    Options without an effect are reset to their defaults, with a warning for each.

    Args:
        settings: The settings of the run; changed in place.

    Raises:
        TrainingError: A setting is wrong, contradicts another, or names something that does not exist.
    """
    leave_out_inert(settings)
    refuse(settings)
    check_machine(settings)
    check_path(settings)
    family = family_on_disk(settings)
    check_known_family(settings, family)
    adapters.check_network(settings, family)
    check_average(settings, optimizer_class(optimizer_name(settings))[0])
    check_schedule(settings)
    check_samples(settings)
    if why := forbidden(settings.output_name or ""):
        raise TrainingError(f"--output_name {settings.output_name}: {why}")
    check_trackers(settings)
    check_uploads(settings)
    adapters.check_sources(settings)
    if settings.resume and not settings.resume_from_huggingface:
        if not Path(settings.resume).exists():
            raise TrainingError(f"--resume {settings.resume} does not exist")
        load_position(Path(settings.resume))
    check_ranges(settings)
    low, high = settings.min_timestep or 0, 1000 if settings.max_timestep is None else settings.max_timestep
    if not 0 <= low < high <= 1000:
        raise OptionError(f"--min_timestep {low} and --max_timestep {high} must be 0 <= min < max <= 1000")


def open_output(settings: Settings) -> None:
    """Create --output_dir. TrainingError if it is not writable, which would otherwise show only at the first save."""
    folder = Path(required(settings.output_dir, "--output_dir"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"--output_dir {folder} cannot be created ({error.strerror or error})") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TrainingError(f"--output_dir {folder} is not writable (permission denied)")


def create_accelerator(settings: Settings) -> Accelerator:
    """Create the Accelerator. The state of an earlier run in this process is reset first, as it fixes the precision."""
    AcceleratorState._reset_state()
    handlers: list[Any] = [
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=settings.ddp_gradient_as_bucket_view, static_graph=settings.ddp_static_graph
        )
    ]
    if settings.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=settings.ddp_timeout)))
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=tracker_names(settings) or None,
        project_dir=settings.logging_dir,
        kwargs_handlers=handlers,
        dynamo_backend=settings.dynamo_backend if settings.torch_compile else None,
    )
    if accelerator.device.type == "cpu":
        torch.set_flush_denormal(True)  # CPUs compute many times slower with denormal numbers
    return accelerator


def decide_seed(settings: Settings) -> int:
    """--seed, or the seed of the resumed run, or a random one that is the same in all processes."""
    if settings.seed is not None:
        return settings.seed
    if settings.resume:
        return load_position(state_folder(settings)).seed
    drawn = [random.SystemRandom().randrange(2**31)]
    return broadcast_object_list(drawn)[0]


def open_data(settings: Settings, seed: int) -> TrainingData:
    """Open the training data. Options that were not given do not override those of the dataset file."""
    return TrainingData(
        load_data_config(settings.given_options()),
        seed=seed,
        prior_loss_weight=settings.prior_loss_weight,
        persistent_workers=settings.persistent_data_loader_workers and workers(settings) > 0,
        pin_memory=torch.cuda.is_available(),
    )


def workers(settings: Settings) -> int:
    """Number of processes that read images: --max_data_loader_n_workers, but at most the number of cores."""
    return min(settings.max_data_loader_n_workers, os.cpu_count() or 1)


def length(settings: Settings, batches_per_epoch: int) -> tuple[int, int]:
    """(optimizer steps, epochs) of the run. The last step of an epoch may have fewer batches."""
    steps_per_epoch = math.ceil(batches_per_epoch / settings.gradient_accumulation_steps)
    if settings.max_train_epochs is not None:
        return settings.max_train_epochs * steps_per_epoch, settings.max_train_epochs
    return settings.max_train_steps, math.ceil(settings.max_train_steps / steps_per_epoch)


def prepare(settings: Settings, models: BaseModels | None = None, data: TrainingData | None = None) -> Run:
    """Set up a run. Options and data are checked before the base model is loaded."""
    check(settings)
    accelerator = create_accelerator(settings)
    if not settings.output_dir and not settings.dry_run:
        raise OptionError("--output_dir is missing: give a folder for the saved files")
    settings.seed = decide_seed(settings)
    data = data or open_data(settings, settings.seed)
    if settings.masked_loss and not data.has_masks:
        raise OptionError("--masked_loss needs masks: --alpha_mask, or --conditioning_data_dir with a folder of them")
    if accelerator.is_main_process and not settings.dry_run:
        open_output(settings)
    uploads = _uploads(settings, accelerator)
    dtype, device = weight_type(settings.mixed_precision), accelerator.device
    models = models or load_base_models(settings, dtype)
    check_base_model(settings, models, data)
    models.choices = ModelChoices.of(settings)
    prompts = (
        read_prompts(Path(required(settings.sample_prompts, "--sample_prompts"))) if wants_samples(settings) else []
    )
    check_samplers_fit(settings, models, prompts)
    torch.manual_seed(settings.seed)  # `down` is initialised randomly
    trained = adapters.trained_components(settings, models)
    train_text = bool(adapters.text_components(trained))
    apply_memory_options(models, settings, train_text)
    adapters.merge_base_weights(settings, models)
    quantise(models, settings.quantize_base, dtype, device)
    adapters.add(settings, models, trained)
    adapters.check_low_precision(settings, trained)
    keep_in_float8(models, settings)
    plain = Denoiser(models, settings.clip_skip, train_text)
    noise, loss = NoiseOptions.of(settings), LossOptions.of(settings, models.v_prediction)
    options = StepOptions(noise, loss, (settings.max_token_length or 75) // 75, settings.weighted_captions)
    optimizer = _optimizer(settings, models, trained, accelerator.is_main_process)
    steps, epochs = length(settings, data.batches_per_epoch(accelerator.num_processes))
    schedule = create_schedule(settings, optimizer, steps)
    data.set_schedule(steps, settings.gradient_accumulation_steps)
    if not settings.dry_run:
        swap_blocks(models, plain, settings.blocks_to_swap, MainMemory(device))
        _to_device(settings, models, plain, device)
        cache(settings, models, plain, data, accelerator, options)
    denoiser, optimizer = accelerator.prepare(plain, optimizer)
    step_loss = StepLoss(models, denoiser, noise_schedule(settings, models), options, device)
    return Run(
        settings=settings,
        accelerator=accelerator,
        models=models,
        data=data,
        trained=trained,
        plain=plain,
        denoiser=denoiser,
        loss=step_loss,
        optimizer=optimizer,
        schedule=schedule,
        steps=steps,
        epochs=epochs,
        uploads=uploads,
        prompts=prompts,
        layers=list(adapters.lora_layers(trained).values()),
    )


def _optimizer(settings: Settings, models: BaseModels, trained: dict[str, Any], is_main: bool) -> torch.optim.Optimizer:
    """Create the optimizer for the trained parameters, and turn off the gradients of all others."""
    unread = adapters.freeze_unread(trained, models, settings.clip_skip)
    if unread and is_main:
        log.info("%d modules in text-encoder layers whose output is not used are saved, but not trained", unread)
    groups = adapters.parameter_groups(settings, models, trained)
    adapters.freeze_rest(trained, groups)
    optimizer = create_optimizer(settings, groups)
    if any(dial.sort_at for dial in controllers(list(trained.values()))):
        check_sortable(settings)
    scale_component_rates(list(trained.values()), optimizer, adapters.ADAPTER)
    return optimizer


def _uploads(settings: Settings, accelerator: Accelerator) -> Uploads | None:
    """The uploads of the main process, created early so that a wrong repository or token is found before loading."""
    active = settings.huggingface_repo_id and accelerator.is_main_process and not settings.dry_run
    return Uploads(settings) if active else None


def _to_device(settings: Settings, models: BaseModels, denoiser: Denoiser, device: torch.device) -> None:
    denoiser.to(device)
    models.vae.to(device)
    if settings.no_half_vae and models.vae.dtype != torch.float32:
        models.vae.to(torch.float32)
