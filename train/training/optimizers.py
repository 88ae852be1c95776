"""Optimizers by name: PyTorch's, and those of well-kept packages, imported only when asked for."""

import ast
import contextlib
import importlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_adapters.optimizer_state import averages_weights, check_restart, unwrapped
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.options.values import did_you_mean, key_values

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kind:
    """The module and the package of an optimizer class, and its default arguments."""

    module: str
    name: str
    package: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)


_NESTEROV = {"momentum": 0.9, "nesterov": True}
_BNB, _DADAPT, _FREE = ("bitsandbytes.optim", "bitsandbytes"), ("dadaptation", "dadaptation"), "schedulefree"
KINDS: dict[str, _Kind] = {
    "adamw": _Kind("torch.optim", "AdamW"),
    "adamw8bit": _Kind(_BNB[0], "AdamW8bit", _BNB[1]),
    "pagedadamw": _Kind(_BNB[0], "PagedAdamW", _BNB[1]),
    "pagedadamw8bit": _Kind(_BNB[0], "PagedAdamW8bit", _BNB[1]),
    "pagedadamw32bit": _Kind(_BNB[0], "PagedAdamW32bit", _BNB[1]),
    "lion": _Kind("lion_pytorch", "Lion", "lion-pytorch"),
    "lion8bit": _Kind(_BNB[0], "Lion8bit", _BNB[1]),
    "pagedlion8bit": _Kind(_BNB[0], "PagedLion8bit", _BNB[1]),
    "sgdnesterov": _Kind("torch.optim", "SGD", defaults=_NESTEROV),
    "sgdnesterov8bit": _Kind(_BNB[0], "SGD8bit", _BNB[1], _NESTEROV),
    "dadaptation": _Kind("dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation"),
    "dadaptadampreprint": _Kind("dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation"),
    "dadaptadagrad": _Kind(_DADAPT[0], "DAdaptAdaGrad", _DADAPT[1]),
    "dadaptadam": _Kind(_DADAPT[0], "DAdaptAdam", _DADAPT[1]),
    "dadaptadan": _Kind(_DADAPT[0], "DAdaptAdan", _DADAPT[1]),
    "dadaptadanip": _Kind("dadaptation.experimental", "DAdaptAdanIP", _DADAPT[1]),
    "dadaptlion": _Kind(_DADAPT[0], "DAdaptLion", _DADAPT[1]),
    "dadaptsgd": _Kind(_DADAPT[0], "DAdaptSGD", _DADAPT[1]),
    "prodigy": _Kind("prodigyopt", "Prodigy", "prodigyopt"),
    "adafactor": _Kind("transformers.optimization", "Adafactor"),
    "adamwschedulefree": _Kind(_FREE, "AdamWScheduleFree", _FREE),
    "radamschedulefree": _Kind(_FREE, "RAdamScheduleFree", _FREE),
    "sgdschedulefree": _Kind(_FREE, "SGDScheduleFree", _FREE),
}


def optimizer_name(settings: Settings) -> str:
    """The optimizer that was asked for, with the old switches and the default taken in."""
    aliases = [name for flag, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")) if
               getattr(settings, flag)]  # fmt: skip
    named = [settings.optimizer_type] if settings.optimizer_type else []
    if len(aliases + named) > 1:
        raise OptionError(f"more than one optimizer is asked for: {', '.join(named + aliases)}")
    return (named + aliases + ["AdamW"])[0]


def literals(pairs: list[str] | dict[str, Any] | None, option: str) -> dict[str, Any]:
    """key=value items with the values as Python literals: `betas=0.9,0.99` is a tuple."""
    values: dict[str, Any] = {}
    for key, text in key_values(pairs, option).items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            capital = text.strip().capitalize()  # true, false, none: as TOML and JSON have them
            hint = f"write {key}={capital}" if capital in ("True", "False", "None") else f"quote text: {key}='...'"
            raise TrainingError(f"--{option}: {key}={text} is not a Python literal; {hint}") from None
    return values


def find_class(name: str, home: str, known: Iterable[str] = ()) -> type:
    """Find a class by name.

    Args:
        name: The name of a class in the module `home`, or a dotted name.
        home: The module of names without a dot.
        known: Names to suggest beside those of the module.

    Returns:
        The class.

    Raises:
        TrainingError: There is no such module or class; the message suggests a similar name.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module or home), attribute)
    except ImportError as error:
        raise TrainingError(f"{name}: {error}") from None
    except AttributeError:
        names = [
            *known,
            *(
                attribute_name
                for attribute_name in vars(importlib.import_module(module or home))
                if attribute_name[0].isupper()
            ),
        ]
        near = did_you_mean(attribute, {attribute_name.lower(): attribute_name for attribute_name in names}.values())
        raise TrainingError(f"there is no {attribute} in {module or home}{near}") from None


def optimizer_class(name: str) -> tuple[type, dict[str, Any]]:
    """The class of an optimizer and its default arguments; names a missing package and how to install it."""
    kind = KINDS.get(name.lower())
    if kind is None:
        return find_class(name, "torch.optim", [known.name for known in KINDS.values()]), {}
    try:
        return getattr(importlib.import_module(kind.module), kind.name), kind.defaults
    except ImportError as error:
        raise TrainingError(
            f"--optimizer_type {name} needs the package {kind.package}: pip install {kind.package} ({error})"
        ) from None
    except AttributeError:
        raise TrainingError(f"--optimizer_type {name}: this version of {kind.package} has no {kind.name}") from None


def uses_relative_step(settings: Settings) -> bool:
    """Whether Adafactor finds the learning rate itself, which is its default."""
    if optimizer_name(settings).lower() != "adafactor":
        return False
    return bool(literals(settings.optimizer_args, "optimizer_args").get("relative_step", True))


def create_optimizer(settings: Settings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Create the optimizer.

    Args:
        settings: The settings of the run.
        groups: Parameter groups, each with params, lr and name.

    Returns:
        The optimizer.

    Raises:
        TrainingError: Its name is unknown, its package is not installed, or it does not accept the arguments.
    """
    name = optimizer_name(settings)
    kind, defaults = optimizer_class(name)
    arguments = {**defaults, **literals(settings.optimizer_args, "optimizer_args")}
    rates = {group["lr"] for group in groups}
    if name.lower().startswith("dadapt") or name.lower() == "prodigy":
        if len(rates - {0}) > 1:
            raise TrainingError(f"{name} needs one learning rate for everything, not {sorted(rates)}")
        if max(rates) <= 0.1:
            log.warning("%s finds the learning rate itself; --learning_rate is a factor, usually 1.0", name)
    if uses_relative_step(settings):
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
        arguments = {"relative_step": True, "lr": None, **arguments}
    try:
        return kind(groups, **arguments) if "lr" in arguments else kind(groups, lr=settings.learning_rate, **arguments)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{name} does not take these arguments: {error}") from None


def state_bytes(settings: Settings, parameters: Iterable[torch.Tensor]) -> int | None:
    """Bytes that the optimizer keeps for `parameters`, measured in a step on one of each shape; None if it fails."""
    alike = Counter((parameter.shape, parameter.dtype, parameter.device) for parameter in parameters)
    copies = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape, dtype, device in alike]
    optimizer = after_one_step(settings, copies)
    if optimizer is None:
        return None
    return sum(
        count * sum(_bytes(value) for value in optimizer.state[copy].values())
        for copy, count in zip(copies, alike.values(), strict=True)
    )


def after_one_step(settings: Settings, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer after a step over weights of a trial, with gradients of one; None if it cannot run here."""
    optimizer = create_optimizer(settings, [{"params": weights, "lr": settings.learning_rate, "name": "trial"}])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    try:
        start_training(optimizer)
        optimizer.step()
    except Exception:  # an optimizer that runs on other devices only
        return None
    return optimizer


def check_sortable(settings: Settings) -> None:
    """AdapterError if the optimizer, one that averages weights, cannot restart when components are sorted."""
    if averages_weights(optimizer_class(optimizer_name(settings))[0]):
        weight = torch.nn.Parameter(torch.zeros(4, 4))
        check_restart(after_one_step(settings, [weight]), [weight])


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def start_training(optimizer: Any) -> None:
    """Tell an optimizer that knows two sets of weights that training begins."""
    inner = unwrapped(optimizer)
    if callable(getattr(inner, "train", None)):
        inner.train()


def settle_weights(optimizer: Any) -> None:
    """Leave the weights as those to save: the end of training."""
    if averages_weights(optimizer):
        unwrapped(optimizer).eval()


@contextlib.contextmanager
def weights_to_keep(optimizer: Any) -> Iterator[None]:
    """A context in which the parameters have the values to save, sample and evaluate.

    Schedule-free optimizers evaluate an average, and train other values. Afterwards the parameters are bit for bit as
    before.

    Args:
        optimizer: The optimizer, also one wrapped by Accelerate.

    Yields:
        None.
    """
    inner = unwrapped(optimizer)
    if not (callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))):
        yield
        return
    weights = [p for group in inner.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
