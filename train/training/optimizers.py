"""Optimizers by name: PyTorch's, and those of other packages, which are imported only if they are used."""

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
    """The name of the optimizer: --optimizer_type, or --use_8bit_adam or --use_lion_optimizer, or AdamW."""
    aliases = [name for flag, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")) if
               getattr(settings, flag)]  # fmt: skip
    named = [settings.optimizer_type] if settings.optimizer_type else []
    if len(aliases + named) > 1:
        raise OptionError(f"more than one optimizer is given: {', '.join(named + aliases)}")
    return (named + aliases + ["AdamW"])[0]


def literals(pairs: list[str] | dict[str, Any] | None, option: str) -> dict[str, Any]:
    """Parse key=value items whose values are Python literals: `betas=0.9,0.99` is a tuple."""
    values: dict[str, Any] = {}
    for key, text in key_values(pairs, option).items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            capital = text.strip().capitalize()  # true, false and none, as in TOML and JSON
            hint = f"write {key}={capital}" if capital in ("True", "False", "None") else f"quote text: {key}='...'"
            raise TrainingError(f"--{option}: {key}={text} is not a Python literal; {hint}") from None
    return values


def find_class(name: str, home: str, known: Iterable[str] = ()) -> type:
    """Find a class by name.

    Args:
        name: The name of a class in the module `home`, or a dotted name with its module.
        home: The module of names without a dot.
        known: More names to suggest in the error message, in addition to the module's classes.

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
    """The class of an optimizer and its default arguments. TrainingError says how to install a missing package."""
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
    """Whether the optimizer is Adafactor with relative_step, its default: it then computes the learning rate itself."""
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
            raise TrainingError(f"{name} needs one learning rate for all parameters, not {sorted(rates)}")
        if max(rates) <= 0.1:
            log.warning("%s computes the learning rate itself; --learning_rate is a factor, usually 1.0", name)
    if uses_relative_step(settings):
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
        arguments = {"relative_step": True, "lr": None, **arguments}
    try:
        return kind(groups, **arguments) if "lr" in arguments else kind(groups, lr=settings.learning_rate, **arguments)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{name} does not accept these arguments: {error}") from None


def state_bytes(settings: Settings, parameters: Iterable[torch.Tensor]) -> int | None:
    """Bytes of the optimizer state for `parameters`, measured in a trial step on one tensor of each shape.

    Args:
        settings: The settings of the run.
        parameters: The trained parameters.

    Returns:
        The bytes; None if the optimizer cannot run on this device.
    """
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
    """A new optimizer after one step on `weights` with gradients of 1; None if it cannot run on this device."""
    optimizer = create_optimizer(settings, [{"params": weights, "lr": settings.learning_rate, "name": "trial"}])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    try:
        start_training(optimizer)
        optimizer.step()
    except Exception:  # an optimizer that does not support this device
        return None
    return optimizer


def check_sortable(settings: Settings) -> None:
    """Raise AdapterError if the optimizer averages weights and cannot be restarted when components are sorted."""
    if averages_weights(optimizer_class(optimizer_name(settings))[0]):
        weight = torch.nn.Parameter(torch.zeros(4, 4))
        check_restart(after_one_step(settings, [weight]), [weight])


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def start_training(optimizer: Any) -> None:
    """Switch an optimizer that has two sets of weights (schedule-free) to the training weights."""
    inner = unwrapped(optimizer)
    if callable(getattr(inner, "train", None)):
        inner.train()


def settle_weights(optimizer: Any) -> None:
    """Switch a schedule-free optimizer to the averaged weights, at the end of training."""
    if averages_weights(optimizer):
        unwrapped(optimizer).eval()


@contextlib.contextmanager
def weights_to_keep(optimizer: Any) -> Iterator[None]:
    """A context in which the parameters have the values to save, sample and evaluate.

    Schedule-free optimizers train one set of weights and evaluate another, their average. Afterwards the parameters
    have exactly their previous values.

    Args:
        optimizer: The optimizer; it may be wrapped by Accelerate.

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
