"""Puts the adapter on the models: its type, the trained components and the initial weights, as the options say."""

import copy
import logging
from typing import Any

import torch
from diffusers.training_utils import cast_training_params

from lora_adapters.adapter import Adapter
from lora_adapters.convert.deltas.base import Delta, with_article
from lora_adapters.convert.deltas.sum import as_pair
from lora_adapters.convert.deltas.with_scalar import WithScalar
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.storage.sources import locate
from lora_adapters.injection import add_adapter, place
from lora_adapters.injection import match_to_model as match_component
from lora_adapters.kohya_options import NetworkOptions, network_options, training_args, without_effect
from lora_adapters.optimizer_groups import param_groups
from lora_adapters.optimizer_state import averages_weights
from lora_adapters.target_modules import RankRule, base_layers
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.models.base import BaseModels
from lora_adapters.train.models.family import TrainingFamily, full_path, is_text_encoder
from lora_adapters.train.models.merging import match_to_model, merge_weights
from lora_adapters.train.models.registry import FAMILIES
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.options.values import key_values
from lora_adapters.train.training.optimizers import optimizer_class, optimizer_name
from lora_adapters.train.training.pattern_counts import warn_of_idle_patterns
from lora_adapters.train.training.regularization import add_dropouts, check_limits
from lora_adapters.train.training.transformer_args import trains_frozen_text, translated
from lora_adapters.types.base import AdapterConfig
from lora_adapters.types.layers import factors, has_adapter, is_factor
from lora_adapters.types.lycoris.config import LycorisConfig
from lora_adapters.types.lycoris.layer import held
from lora_adapters.types.lycoris.weights import DeltaWeights
from lora_adapters.types.registry import covered, facts_for, parts_of

log = logging.getLogger(__name__)

ADAPTER = "default"
_SAME_OPTIONS = "the same network options, or --dim_from_weights"


def options(settings: Settings, family: TrainingFamily) -> NetworkOptions:
    """Parse --network_module, --network_dim, --network_alpha and --network_args for a base model of `family`."""
    if not settings.network_module:
        raise OptionError("--network_module is missing: networks.lora, networks.dylora, networks.loha, ...")
    args = translated(key_values(settings.network_args, "network_args"), family)
    args = {name: value for name, value in args.items() if name not in without_effect(settings.network_module, args)}
    asked = args
    args = training_args(settings.network_module, asked)
    defaulted = "rate_power" in args and "rate_power" not in asked
    if defaulted and averages_weights(optimizer_class(optimizer_name(settings))[0]):
        del args["rate_power"]  # `scale_component_rates` refuses this default with optimizers that average weights
    return network_options(settings.network_module, settings.network_dim, settings.network_alpha, args, family.name)


def check_network(settings: Settings, family: TrainingFamily | None) -> None:
    """Check the network options before the base model is loaded.

    Args:
        settings: The settings of the run.
        family: The family of the base model. None if it is not known yet: the options must then suit at least one
            family.

    Raises:
        OptionError: Options contradict each other, or a value is out of range.
        AdapterError: A value of --network_args is wrong.
    """
    if settings.network_train_unet_only and settings.network_train_text_encoder_only:
        raise OptionError("--network_train_unet_only and --network_train_text_encoder_only leave nothing to train")
    if settings.dim_from_weights and not settings.network_weights:
        raise OptionError("--dim_from_weights needs --network_weights")
    weights, multipliers = settings.base_weights or [], settings.base_weights_multiplier or []
    if multipliers and len(multipliers) > len(weights):
        raise OptionError(f"--base_weights_multiplier has {len(multipliers)} values for {len(weights)} --base_weights")
    if settings.network_dropout is not None and not 0 <= settings.network_dropout < 1:
        raise OptionError(f"--network_dropout must be at least 0 and below 1, not {settings.network_dropout}")
    if settings.scale_weight_norms is not None and settings.scale_weight_norms < 0:
        raise OptionError(f"--scale_weight_norms must be above 0 (0: off), not {settings.scale_weight_norms}")
    if family is not None:
        warn_without_effect(settings, family)
    *others, last = [family] if family is not None else reversed(FAMILIES.values())
    for possible in others:
        try:
            options(settings, possible)
            return
        except AdapterError:
            continue
    options(settings, last)


def warn_without_effect(settings: Settings, family: TrainingFamily) -> None:
    """Warn of each of --network_args that has no effect on a base model of `family`."""
    args = translated(key_values(settings.network_args, "network_args"), family)
    for name, reason in without_effect(settings.network_module or "", args).items():
        log.warning("--network_args %s is ignored: %s", name, reason)


def trained_components(settings: Settings, models: BaseModels) -> dict[str, Any]:
    """The models that get an adapter.

    Args:
        settings: The settings of the run.
        models: The base model.

    Returns:
        Models by their component name in a pipeline, except models without a matching module.

    Raises:
        TrainingError: No module is left to train.
    """
    chosen = models.components
    if settings.network_train_unet_only:
        chosen = {models.denoiser_name: models.denoiser}
    elif settings.network_train_text_encoder_only:
        chosen = text_components(chosen)
    if settings.dim_from_weights:
        return chosen
    config = options(settings, models.family).config
    if not trains_frozen_text(key_values(settings.network_args, "network_args")):
        chosen = {name: model for name, model in chosen.items() if name not in models.family.frozen_text_encoders}
    trained = {name: model for name, model in chosen.items() if _has_modules(model, config)}
    if not trained:
        raise TrainingError(
            f"nothing is left to train in {', '.join(chosen)}: every block has rank or weight 0, or preset, "
            "include_patterns and exclude_patterns leave all modules out"
        )
    return trained


def text_components(trained: dict[str, Any]) -> dict[str, Any]:
    """The text encoders among the trained models."""
    return {name: model for name, model in trained.items() if is_text_encoder(name)}


def _has_modules(model: Any, config: AdapterConfig) -> bool:
    rule = RankRule(config, [path for path, _, _ in base_layers(model)])
    try:
        paths = covered(model, config)
    except AdapterError:  # a preset without modules in this model
        if config.preset is None:
            raise
        return False
    return any(rule(path, model.get_submodule(path)).rank for path in paths)


def add(settings: Settings, models: BaseModels, trained: dict[str, Any]) -> None:
    """Put the adapter on the models, in fp32 (bf16 with --full_bf16), with the weights of --network_weights if any."""
    asked = options(settings, models.family)
    source = settings.network_weights or ""
    start = load_source(settings, "network_weights", source) if source else None
    if start is not None and settings.dim_from_weights:
        _place(trained, start, _facts(settings, asked.config, start), source)
    else:
        for model in trained.values():
            add_adapter(model, copy.deepcopy(asked.config), ADAPTER)
        warn_of_idle_patterns(asked, trained)
        if start is not None:
            load_start(trained, start, source)
    for model in trained.values():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_factor(name))
    cast_training_params(list(trained.values()), torch.bfloat16 if settings.full_bf16 else torch.float32)
    layers = lora_layers(trained).values()
    if settings.scale_weight_norms:
        check_limits(layers, ADAPTER)
    dropout = settings.network_dropout if asked.dropout is None else asked.dropout
    add_dropouts(layers, ADAPTER, dropout, asked.rank_dropout, asked.module_dropout)


def check_low_precision(settings: Settings, trained: dict[str, Any]) -> None:
    """Raise OptionError for --fp8_base or --quantize_base with adapter types that may read the base weights."""
    if not (settings.fp8_base or settings.fp8_base_unet or settings.quantize_base):
        return
    option = "--quantize_base" if settings.quantize_base else "--fp8_base"
    if any(held(layer, ADAPTER) is not None for layer in lora_layers(trained).values()):
        raise OptionError(
            f"{option} works with LoRA, C3Lier and DyLoRA only: other types may read the base weights; "
            "use --mixed_precision bf16 instead"
        )


def lora_layers(trained: dict[str, Any]) -> dict[ModuleName, Any]:
    """The trained modules by name; names include `text_model.`, which some versions of transformers leave out."""
    layers = {}
    for component, model in trained.items():
        for path, module in model.named_modules():
            if has_adapter(module, ADAPTER):
                layers[ModuleName(component, full_path(component, path))] = module
    return layers


def load_start(trained: dict[str, Any], start: Adapter, source: str) -> None:
    """Initialise the trained modules from a saved adapter. Modules that only one of the two has are skipped.

    If alpha / rank in the file differs from the trained adapter's, `up` is multiplied by the ratio, so that training
    starts from the delta in the file.

    Args:
        trained: The trained models, by component.
        start: The saved adapter.
        source: Where `start` was loaded from, for error messages.

    Raises:
        TrainingError: The kinds of delta or the ranks differ, or the file has none of the trained modules.
    """
    layers = lora_layers(trained)
    used = 0
    for name, change in start.modules.items():
        if name not in layers:
            continue
        layer = layers[name]
        if (weights := held(layer, ADAPTER)) is not None:
            _start_from(weights, change, f"--network_weights {source}: {name}")
            used += 1
            continue
        low_rank = as_pair(change)
        if low_rank is None:
            kind = with_article(change.kind)
            raise TrainingError(f"--network_weights {source}: {name} has {kind}, not a LoRA; give {_SAME_OPTIONS}")
        down, up = (factor.weight for factor in factors(layer, ADAPTER))
        if low_rank.rank != down.shape[0]:
            raise TrainingError(
                f"--network_weights {source}: {name} has rank {low_rank.rank}, not {down.shape[0]}; "
                "give the same --network_dim, or --dim_from_weights"
            )
        factor = low_rank.scale / float(layer.scaling[ADAPTER])
        with torch.no_grad():
            down.copy_(low_rank.down.reshape(down.shape))
            up.copy_(low_rank.up.float().reshape(up.shape) * factor)
        used += 1
    if not used:
        raise TrainingError(f"--network_weights {source} has none of the modules that are trained")
    if used < len(start.modules) or used < len(layers):
        log.warning("%s: %d of its %d modules initialise %d of the %d trained modules", source, used,
                    len(start.modules), used, len(layers))  # fmt: skip


def _start_from(weights: DeltaWeights, change: Delta, where: str) -> None:
    """Replace a module's delta by the file's, which must have the same kind and shapes.

    The alpha may differ: training uses the file's.
    """
    with_scalar = weights.change
    if isinstance(getattr(with_scalar, "change", None), WithScalar) or isinstance(with_scalar, WithScalar):
        raise TrainingError(f"{where} cannot be loaded with use_scalar: files have no scalar; leave use_scalar out")
    if not weights.is_like(change):
        raise TrainingError(f"{where} has {with_article(change.kind)} of another kind or shape; give {_SAME_OPTIONS}")
    weights.replace(change)


def load_source(settings: Settings, name: str, source: str) -> Adapter:
    """Load the value of option `name`: a file, a PEFT folder or a Hub repository. TrainingError if it is unreadable."""
    try:
        return Adapter.load(locate(source, token=settings.huggingface_token))
    except AdapterError as error:
        where = f"--{name}" if str(error).startswith(str(source)) else f"--{name} {source}:"
        raise TrainingError(f"{where} {error}") from error


def check_sources(settings: Settings) -> None:
    """Raise TrainingError if --network_weights or --base_weights cannot be read; repositories are downloaded."""
    for name, sources in (("network_weights", [settings.network_weights]), ("base_weights", settings.base_weights)):
        for source in sources or []:
            if source:
                load_source(settings, name, source)


def merge_base_weights(settings: Settings, models: BaseModels) -> None:
    """Merge --base_weights into the base model, each times its multiplier (1 if there is none)."""
    multipliers = list(settings.base_weights_multiplier or [])
    for number, source in enumerate(settings.base_weights or []):
        weight = multipliers[number] if number < len(multipliers) else 1.0
        merge_weights([(match_to_model(models, load_source(settings, "base_weights", source)), weight)])


def parameter_groups(settings: Settings, models: BaseModels, trained: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups with params, lr and name. TrainingError if there is nothing to train."""
    encoders = list(text_components(trained).values())
    text_rates = settings.text_encoder_lr or []
    if len(text_rates) > max(1, len(encoders)) and len(set(text_rates)) > 1:
        raise TrainingError(f"--text_encoder_lr has {len(text_rates)} values for {len(encoders)} text encoders")
    if len(set(text_rates)) == 1:
        text_rates = text_rates[:1]  # kohya's GUI gives SD1.x, which has one text encoder, the same rate twice
    asked = options(settings, models.family)
    return param_groups(
        trained.get(models.denoiser_name),
        encoders,
        lr=settings.learning_rate,
        unet_lr=settings.unet_lr,
        text_encoder_lr=text_rates[0] if len(text_rates) == 1 else text_rates or None,
        block_lr_weights=asked.block_lr_weights,
        loraplus_lr_ratio=asked.loraplus_lr_ratio,
        loraplus_unet_lr_ratio=asked.loraplus_unet_lr_ratio,
        loraplus_text_encoder_lr_ratio=asked.loraplus_text_encoder_lr_ratio,
        reg_lrs=asked.reg_lrs,
        adapter_name=ADAPTER,
    )


def freeze_unread(trained: dict[str, Any], models: BaseModels, clip_skip: int | None) -> int:
    """Turn off gradients for adapters of text-encoder layers whose output is not used.

    Their weights are saved unchanged, as kohya's trainer does. With several processes, a trainable parameter that
    never gets a gradient would make DistributedDataParallel wait forever.

    Args:
        trained: The trained models, by component.
        models: The base model.
        clip_skip: The option --clip_skip; None means the family's default.

    Returns:
        The number of modules whose gradients were turned off.
    """
    layers = models.family.unread_layers(models.text_encoders, clip_skip)
    unread = {id(part) for layer in layers for part in layer.modules()}
    count = 0
    for layer in lora_layers(text_components(trained)).values():
        if id(layer) in unread:
            count += 1
            for _, part in parts_of(layer, ADAPTER):
                part.requires_grad_(False)
    return count


def freeze_rest(trained: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Turn off gradients for parameters with a learning rate of 0: they are saved, but not trained."""
    chosen = {id(parameter) for group in groups for parameter in group["params"]}
    for model in trained.values():
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)


def _facts(settings: Settings, asked: AdapterConfig, start: Adapter) -> dict[str, Any]:
    """The fields of the adapter type's config: from --network_args, else from the file's metadata."""
    facts = facts_for(asked, start.metadata, key_values(settings.network_args, "network_args"))
    return {"type": facts["type"]} if isinstance(asked, LycorisConfig) else facts  # the file has the rest


def _place(trained: dict[str, Any], start: Adapter, facts: dict[str, Any], source: str) -> None:
    """Put on an adapter of the type of --network_module with the ranks, alphas and weights of a file."""
    for component, model in trained.items():
        modules = {name.path: change for name, change in start.modules.items() if name.component == component}
        if modules:
            place(model, match_component(model, component, modules), ADAPTER, facts)
    if not lora_layers(trained):
        raise TrainingError(f"--network_weights {source} has no module of {', '.join(trained)}")
