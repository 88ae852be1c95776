"""What optimizers keep for each weight, when the weights become others that mean the same."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lora_adapters.convert.errors import AdapterError

# Sums of gradients, which are reset.
_GRADIENTS = ("exp_avg", "momentum_buffer", "grad_avg", "s")
# Sizes of gradients, which stay about the same: each number becomes the mean of its tensor.
_SIZES = (
    "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum", "square_avg",
    "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance",
)  # fmt: skip
_WEIGHTS = ("z", "p0")  # copies of the weights: averaged with them (schedule-free), or their start (Prodigy)
_EIGHT_BIT = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")  # bitsandbytes: first and second moments
_BLOCK = 256  # numbers that have one entry of absmax
BASIS = "basis"  # the key of the matrix that `component_steps` keeps beside them
_SUMS = ("d_numerator", "d_denom")  # Prodigy's, since the start; the step size that it found stays
_KNOWN = (*_GRADIENTS, *_SIZES, *_WEIGHTS, *_EIGHT_BIT, "step", "unorm_vec")


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer in one that accelerate may have wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def averages_weights(optimizer: Any) -> bool:
    """Whether an optimizer, or a class of them, averages the weights (schedule-free) and has `train` and `eval`."""
    return callable(getattr(unwrapped(optimizer), "eval", None))


def check_restart(optimizer: Any, parameters: Iterable[torch.Tensor]) -> None:
    """AdapterError where `restart` does not know what to do with something that the optimizer keeps."""
    if optimizer is None:
        return
    inner = unwrapped(optimizer)
    name = type(inner).__name__
    for parameter in parameters:
        for key, value in inner.state.get(parameter, {}).items():
            if _is_unknown(key, value):
                raise AdapterError(
                    f"{name} keeps {key} for each weight, of which it is not known what becomes of it when components "
                    "are sorted: take sort_at=0, or another optimizer"
                )


@contextmanager
def restart(optimizer: Any, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """A context in which parameters are replaced by equivalent ones; the optimizer then restarts with its present step
    sizes.

    First moments become zero and second moments the mean of their tensor. An optimizer that averages parameters
    (schedule-free) continues from its averages.

    Args:
        optimizer: A torch optimizer, also one wrapped by Accelerate; None does nothing.
        parameters: The parameters that change.

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
    """Make what a torch optimizer keeps for parameters that have been replaced that of a restart; see `restart`."""
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
        state.clear()  # as before the first step
        return
    changes: dict[Sequence[str], Callable[[torch.Tensor], Any]] = {
        _GRADIENTS: torch.Tensor.zero_,
        _SIZES: lambda value: value.fill_(value.mean()),
        _WEIGHTS: lambda value: value.copy_(weight),
    }
    if "p0" in state:  # Prodigy has a part of the weights only, and a number where they were zero
        state["p0"] = weight.flatten()[:: group["slice_p"]].clone()
    for names, change in changes.items():
        for name in names:
            if isinstance(state.get(name), torch.Tensor) and name != "p0":
                change(state[name])
    if "state1" in state:
        _restart_bitsandbytes(state)


def _restart_bitsandbytes(state: dict[str, Any]) -> None:
    """state1 is the first moment; state2, where there is one, the second. In 8 bits: codes, and a factor a block."""
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
