"""The network options put on the models: which adapter, on which of them, and from which weights."""

import argparse
import logging
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from lora_adapters import Adapter, network_config, param_groups
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.low_rank import LowRank
from lora_adapters.convert.names import ModuleName
from lora_adapters.train.arguments import key_values
from lora_adapters.train.base_models import BaseModels
from lora_adapters.train.errors import TrainingError

log = logging.getLogger(__name__)

ADAPTER = "default"
_DROPOUTS = ("rank_dropout", "module_dropout")
_LORAPLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


@dataclass(frozen=True)
class NetworkArgs:
    """--network_args, sorted by who reads them: the adapter's config, the dropouts, the learning rates."""

    config: dict[str, str]
    dropouts: dict[str, float]
    loraplus: dict[str, float]


def network_args(settings: argparse.Namespace) -> NetworkArgs:
    """Raises TrainingError for an item that is not key=value, or a number that is none."""
    pairs = key_values(settings.network_args, "network_args")
    return NetworkArgs(
        config={key: value for key, value in pairs.items() if key not in _DROPOUTS + _LORAPLUS},
        dropouts={key: _number(key, pairs[key]) for key in _DROPOUTS if key in pairs},
        loraplus={key: _number(key, pairs[key]) for key in _LORAPLUS if key in pairs},
    )


def check_network(settings: argparse.Namespace) -> None:
    """Raise TrainingError for network options that contradict each other."""
    if settings.network_train_unet_only and settings.network_train_text_encoder_only:
        raise TrainingError("--network_train_unet_only and --network_train_text_encoder_only leave nothing to train")
    if settings.dim_from_weights and not settings.network_weights:
        raise TrainingError("--dim_from_weights needs --network_weights")
    weights, multipliers = settings.base_weights or [], settings.base_weights_multiplier or []
    if multipliers and len(multipliers) > len(weights):
        raise TrainingError(f"{len(multipliers)} of --base_weights_multiplier for {len(weights)} of --base_weights")
    if settings.network_dropout is not None and not 0 <= settings.network_dropout < 1:
        raise TrainingError(f"--network_dropout must be at least 0 and below 1, not {settings.network_dropout}")
    if settings.scale_weight_norms is not None and settings.scale_weight_norms <= 0:
        raise TrainingError(f"--scale_weight_norms must be above 0, not {settings.scale_weight_norms}")
    adapter_config(settings)


def adapter_config(settings: argparse.Namespace) -> Any:
    """The PEFT config that --network_module, --network_dim, --network_alpha and --network_args ask for."""
    if not settings.network_module:
        raise TrainingError("--network_module is missing: networks.lora or networks.dylora")
    dim = 4 if settings.network_dim is None else settings.network_dim
    return network_config(settings.network_module, dim, settings.network_alpha, network_args(settings).config)


def trained_components(settings: argparse.Namespace, models: BaseModels) -> dict[str, torch.nn.Module]:
    """The models that get an adapter, by the name of their part in a pipeline."""
    every = models.components
    if settings.network_train_unet_only:
        return {"unet": every["unet"]}
    if settings.network_train_text_encoder_only:
        return {name: model for name, model in every.items() if name != "unet"}
    return every


def add(settings: argparse.Namespace, models: BaseModels, trained: dict[str, torch.nn.Module]) -> None:
    """Put the adapter on the models, its weights in fp32 (bf16 with --full_bf16), from --network_weights if given."""
    start = Adapter.load(settings.network_weights) if settings.network_weights else None
    if start is not None and settings.dim_from_weights:
        start.to_models(trained, adapter_name=ADAPTER)
    else:
        for model in trained.values():
            model.add_adapter(adapter_config(settings), adapter_name=ADAPTER)
        if start is not None:
            load_start(trained, start, settings.network_weights)
    for model in trained.values():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
    dtype = torch.bfloat16 if settings.full_bf16 else torch.float32
    cast_training_params(list(trained.values()), dtype)


def lora_layers(trained: dict[str, torch.nn.Module]) -> dict[ModuleName, LoraLayer]:
    """The trained modules by name; names keep the `text_model.` that transformers may leave out."""
    found = {}
    for component, model in trained.items():
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
                found[ModuleName(component, _full_path(component, path))] = module
    return found


def load_start(trained: dict[str, torch.nn.Module], start: Adapter, source: str) -> None:
    """Start from an adapter's changes: modules that only one side has are left alone.

    Where the file's alpha is another than the one that is trained with, `up` takes up the difference, so that training
    starts from the change that the file means. TrainingError where ranks differ.
    """
    layers = lora_layers(trained)
    used = 0
    for name, low_rank in start.modules.items():
        if name not in layers:
            continue
        layer = layers[name]
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
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
        log.warning("%s: %d of its %d modules start %d of the %d that are trained", source, used, len(start.modules),
                    used, len(layers))  # fmt: skip


def merge_base_weights(settings: argparse.Namespace, models: BaseModels) -> None:
    """Add the changes of --base_weights, each times its multiplier (1 where there is none), to the base model."""
    multipliers = list(settings.base_weights_multiplier or [])
    for number, source in enumerate(settings.base_weights or []):
        weight = multipliers[number] if number < len(multipliers) else 1.0
        for name, low_rank in Adapter.load(source).modules.items():
            try:
                _add_delta(models, name, low_rank, weight)
            except (AdapterError, AttributeError, KeyError) as error:
                raise TrainingError(f"--base_weights {source}: {name} does not fit the base model ({error})") from None


def parameter_groups(
    settings: argparse.Namespace, models: BaseModels, trained: dict[str, torch.nn.Module]
) -> list[dict[str, Any]]:
    """Parameter groups with params, lr and name. TrainingError where nothing is left to train."""
    encoders = [model for name, model in trained.items() if name != "unet"]
    text_rates = settings.text_encoder_lr or [None]
    if len(text_rates) > max(1, len(encoders)):
        raise TrainingError(f"{len(text_rates)} of --text_encoder_lr for {len(encoders)} text encoders")
    args = network_args(settings)
    groups = param_groups(
        trained.get("unet"),
        encoders,
        lr=settings.learning_rate,
        unet_lr=settings.unet_lr,
        text_encoder_lr=text_rates[0] if len(text_rates) == 1 else text_rates,
        **block_rates(settings, models),
        **args.loraplus,
    )
    if not any(group["params"] for group in groups):
        raise TrainingError("there is nothing to train: all learning rates or all ranks are 0")
    return groups


def _add_delta(models: BaseModels, name: ModuleName, low_rank: LowRank, weight: float) -> None:
    model = models.components[name.component]
    path = name.path
    if name.component != "unet" and not hasattr(model, "text_model"):
        path = path.removeprefix("text_model.")
    module = model.get_submodule(path)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    fitting = low_rank.shaped_like(tuple(base.weight.shape))
    with torch.no_grad():
        base.weight += (weight * fitting.delta()).reshape(base.weight.shape).to(base.weight)


def _full_path(component: str, path: str) -> str:
    return path if component == "unet" or path.startswith("text_model.") else f"text_model.{path}"


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TrainingError(f"--network_args: {key}={text} is not a number") from None
