"""Resetting an optimizer's state when weights are replaced by equivalent ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lora_adapters.convert.errors import AdapterError

# Running sums of gradients, which are reset.
_GRADIENTS = ("exp_avg", "momentum_buffer", "grad_avg", "s")
# Magnitudes of gradients, which stay about the same: each value is replaced by the mean of its tensor.
_SIZES = (
    "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg",
    "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance",
)  # fmt: skip
_WEIGHTS = ("z", "p0")  # copies of the weights: for averaging (schedule-free), or their initial values (Prodigy)
_EIGHT_BIT = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")  # bitsandbytes: first and second moments
_BLOCK = 256  # the number of values for each entry of absmax
BASIS = "basis"  # the key of the matrix that `component_steps` adds to the state
_SUMS = ("d_numerator", "d_denom")  # Prodigy's sums since the start; its estimated step size is kept
_KNOWN = (*_GRADIENTS, *_SIZES, *_WEIGHTS, *_EIGHT_BIT, "step", "unorm_vec")


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside of accelerate's wrapper, if it is wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def averages_weights(optimizer: Any) -> bool:
    """Whether an optimizer, or its class, averages the weights (schedule-free) and has `train` and `eval`."""
    return callable(getattr(unwrapped(optimizer), "eval", None))


def check_restart(optimizer: Any, parameters: Iterable[torch.Tensor]) -> None:
    """Raise AdapterError if `restart` does not support an entry of the optimizer's state."""
    if optimizer is None:
        return
    inner = unwrapped(optimizer)
    name = type(inner).__name__
    for parameter in parameters:
        for key, value in inner.state.get(parameter, {}).items():
            if _is_unknown(key, value):
                raise AdapterError(
                    f"{name} has the unknown state {key}, which cannot be converted when components are sorted: use "
                    "sort_at=0 or another optimizer"
                )


@contextmanager
def restart(optimizer: Any, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """A context in which parameters are replaced by equivalent ones; the optimizer then restarts with its step sizes.

    First moments become zero and second moments the mean of their tensor. An optimizer that averages parameters
    (schedule-free) continues from its averages.

    Args:
        optimizer: A torch optimizer, which may be wrapped by accelerate; None does nothing.
        parameters: The parameters that are replaced.

    Yields:
        None.
    """
    inner = unwrapped(optimizer)
    if inner is None:
        yield
        return
    averages = averages_weights(inner) and inner.param_groups[0].get("train_mode", False)
    if averages:
        inner.eval()
    try:
        yield
        reset(inner, parameters)
    finally:
        if averages:
            inner.train()


def reset(optimizer: Any, parameters: Iterable[torch.Tensor]) -> None:
    """Reset the state of a torch optimizer for parameters that have been replaced; see `restart`."""
    changed = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in changed:
                _restart(optimizer.state.get(parameter, {}), parameter.detach(), group)
        group.update({name: 0.0 for name in _SUMS if name in group})


def _is_unknown(key: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 1 and key not in _KNOWN


def _restart(state: dict[str, Any], weight: torch.Tensor, group: dict[str, Any]) -> None:
    state.pop(BASIS, None)
    if any(_is_unknown(key, value) for key, value in state.items()):
        state.clear()  # the state before the first step
        return
    changes: dict[Sequence[str], Callable[[torch.Tensor], Any]] = {
        _GRADIENTS: torch.Tensor.zero_,
        _SIZES: lambda value: value.fill_(value.mean()),
        _WEIGHTS: lambda value: value.copy_(weight),
    }
    if "p0" in state:  # Prodigy keeps only a part of the weights, or a scalar if they were zero
        state["p0"] = weight.flatten()[:: group["slice_p"]].clone()
    for names, change in changes.items():
        for name in names:
            if isinstance(state.get(name), torch.Tensor) and name != "p0":
                change(state[name])
    if "state1" in state:
        _restart_bitsandbytes(state)


def _restart_bitsandbytes(state: dict[str, Any]) -> None:
    """state1 is the first moment, state2 (if present) the second. In 8 bits: codes, and a factor for each block."""
    if state["state1"].dtype != torch.uint8:
        state["state1"].zero_()
        if state.get("state2") is not None:
            state["state2"].fill_(state["state2"].mean())
        return
    state["absmax1"].zero_()
    if state.get("state2") is not None:
        codes = state["qmap2"][state["state2"].flatten().long()]
        factors = state["absmax2"].repeat_interleave(_BLOCK)[: len(codes)]
        state["absmax2"].fill_((codes * factors).mean())
        state["state2"].fill_(int(state["qmap2"].argmax()))  # the code of 1
