"""Hooks around optimizer steps: scale steps by component, and let the optimizer continue after components are sorted.

Sorting the components of a pair changes both factors: up = up_before · A, down = A⁻¹ · down_before. The optimizer's
state, however, belongs to the factors before sorting. So A is stored in the optimizer state of each weight. For each
step the weights and gradients are transformed back to the basis before sorting; the optimizer's change of these weights
is then transformed and applied to the sorted weights. This works for any optimizer, which does not notice the sorting.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lora_adapters.convert.errors import AdapterError
from lora_adapters.optimizer_state import BASIS  # the key of A (rank, rank) in the optimizer state of a weight
from lora_adapters.types.layers import factors

_steps: "WeakKeyDictionary[torch.optim.Optimizer, ComponentSteps]" = WeakKeyDictionary()
_LARGEST_CONDITION = 1e6  # the limit of A's condition number, above which float32 is not precise enough for a step


class Components(NamedTuple):
    """A factor of a pair: its weight, the dimension of the components, and the rates of their steps (rank,) or None."""

    weight: nn.Parameter
    dim: int
    rates: torch.Tensor | None = None

    def columns(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the weight's shape as a matrix (rest, rank)."""
        return values.flatten(1).T if self.dim == 0 else values.flatten(1)


def change_of_basis(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """Find the matrix A with before · A = after.

    Args:
        before: (rest, rank), a factor before sorting, with one column for each component.
        after: The same factor after sorting.

    Returns:
        A, (rank, rank), float64; None if no invertible A exists, as for factors with fewer rows than columns.
    """
    if torch.equal(before, after):  # also for an untrained `up` of zeros
        return torch.eye(before.shape[1], dtype=torch.float64, device=before.device)
    before, after = before.double(), after.double()
    if len(before) < before.shape[1]:
        return None
    basis = torch.linalg.lstsq(before, after, driver="gels" if before.is_cuda else "gelsd").solution
    if not (bool(basis.isfinite().all()) and float(torch.linalg.cond(basis)) <= _LARGEST_CONDITION):
        return None
    missing = torch.linalg.matrix_norm(before @ basis - after)
    return basis if missing <= 1e-4 * torch.linalg.matrix_norm(after) else None


def keep_bases(
    optimizer: torch.optim.Optimizer, parts: Sequence[Components], before: Sequence[torch.Tensor]
) -> list[nn.Parameter]:
    """Let an optimizer continue with weights whose components have been replaced by equivalent ones.

    Args:
        optimizer: A torch optimizer with `ComponentSteps`.
        parts: The factors with their new weights; the same in all processes of a distributed training.
        before: The previous values of the weights.

    Returns:
        The weights for which this is impossible, so that their optimizer state must be reset.
    """
    # A weight without optimizer state has not been stepped: it simply starts with the new components.
    stepped = [(part, was) for part, was in zip(parts, before, strict=True) if optimizer.state.get(part.weight)]
    bases = [change_of_basis(part.columns(was), part.columns(part.weight.detach())) for part, was in stepped]
    lost = []
    for (part, _), basis in zip(stepped, _agreed(bases, [part for part, _ in stepped]), strict=True):
        state = optimizer.state[part.weight]
        if basis is None:
            lost.append(part.weight)
            continue
        if BASIS in state:
            basis = state[BASIS].to(basis) @ basis
        # In the weight's dtype, to which a state dict would cast it on resuming: resumed training is bitwise identical.
        state[BASIS] = basis.to(part.weight)
    return lost


def _agreed(bases: list[torch.Tensor | None], parts: list[Components]) -> list[torch.Tensor | None]:
    """The bases of the main process, sent to all processes of a distributed training, whose rounding may differ."""
    distributed = torch.distributed
    if not (bases and distributed.is_available() and distributed.is_initialized()):
        return bases
    known = torch.tensor([basis is not None for basis in bases], dtype=torch.uint8, device=parts[0].weight.device)
    distributed.broadcast(known, 0)
    agreed: list[torch.Tensor | None] = []
    for basis, part, is_known in zip(bases, parts, known.tolist(), strict=True):
        rank = part.weight.shape[part.dim]
        shared = part.weight.new_zeros(rank, rank, dtype=torch.float64) if basis is None else basis.contiguous()
        if is_known:
            distributed.broadcast(shared, 0)
        agreed.append(shared if is_known else None)
    return agreed


def components_of(layer: Any, adapter_name: str) -> list[Components]:
    """The two factors of an adapter in a layer."""
    return [Components(factor.weight, dim) for dim, factor in enumerate(factors(layer, adapter_name))]


def steps_of(optimizer: torch.optim.Optimizer) -> "ComponentSteps":
    """The `ComponentSteps` of an optimizer, created on first use."""
    if optimizer not in _steps:
        _steps[optimizer] = ComponentSteps(optimizer)
    return _steps[optimizer]


class _Batch(NamedTuple):
    """The stacked weights of one shape, as matrices, for one step."""

    parts: Sequence[Components]
    start: torch.Tensor
    raw: torch.Tensor
    basis: torch.Tensor | None
    gradients: list[torch.Tensor | None]


class ComponentSteps:
    """Hooks of an optimizer that scale its steps by component and take them in the basis of its state."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.parts: dict[int, Components] = {}
        self._batches: list[_Batch] = []
        self._inverses: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def add(self, parts: Iterable[Components]) -> None:
        """Add weights to the hooks; weights that were added before get the new rates."""
        self.parts |= {id(part.weight): part for part in parts}

    def has(self, weight: nn.Parameter) -> bool:
        """Whether a weight has been added."""
        return id(weight) in self.parts

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step: save the weights, and transform them and their gradients to the optimizer's basis."""
        groups: dict[Any, list[Components]] = defaultdict(list)
        for number, part in self.parts.items():
            weight = part.weight
            if part.rates is not None and part.rates.device != weight.device:
                # Moved only once: a copy to a GPU in each step would synchronise with it.
                part = self.parts[number] = part._replace(rates=part.rates.to(weight.device))
            turned = BASIS in optimizer.state.get(weight, {})
            if turned and (*args[1:], kwargs.get("closure"))[0] is not None:  # the first argument is the optimizer
                raise AdapterError("step() with a closure is not supported after sorting: call step() without one")
            if weight.grad is not None and (turned or part.rates is not None):
                key = weight.shape, part.dim, weight.dtype, weight.device, turned, part.rates is not None
                groups[key].append(part)
        self._batches = [self._turned(optimizer, parts, key[4]) for key, parts in groups.items()]

    def _turned(self, optimizer: torch.optim.Optimizer, parts: list[Components], turned: bool) -> _Batch:
        start = _stacked([part.weight for part in parts])
        gradients = [part.weight.grad for part in parts]
        if not turned:
            return _Batch(parts, start, start, None, gradients)
        bases = [optimizer.state[part.weight][BASIS] for part in parts]
        basis = torch.stack([own.float() for own in bases])
        inverse = torch.stack([self._inverse(part, own) for part, own in zip(parts, bases, strict=True)])
        raw = _multiplied(start, inverse, parts[0].dim)
        slopes = _stacked([gradient for gradient in gradients if gradient is not None])
        slopes = _multiplied(slopes, basis.mT, parts[0].dim)
        _write(parts, raw)
        for part, slope in zip(parts, slopes, strict=True):
            part.weight.grad = slope.reshape(part.weight.shape).to(part.weight)
        if parts[0].weight.dtype != torch.float32:
            raw = _stacked([part.weight for part in parts])  # as the optimizer sees them, after rounding
        return _Batch(parts, start, raw, basis, gradients)

    def _inverse(self, part: Components, basis: torch.Tensor) -> torch.Tensor:
        known = self._inverses.get(id(part.weight))
        if known is None or known[0] is not basis:
            known = self._inverses[id(part.weight)] = basis, torch.linalg.inv(basis.double()).float()
        return known[1]

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: apply the optimizer's change to the saved weights."""
        for parts, start, raw, basis, gradients in self._batches:
            dim, values = parts[0].dim, _stacked([part.weight for part in parts])
            if parts[0].rates is not None:
                rates = torch.stack([part.rates for part in parts])  # type: ignore[misc]
                values = torch.lerp(raw, values, (rates[:, :, None] if dim == 0 else rates[:, None]).expand_as(values))
            if basis is not None:
                values = start.add_(_multiplied(values.sub_(raw), basis, dim))
            _write(parts, values)
            for part, gradient in zip(parts, gradients, strict=True):
                part.weight.grad = gradient
        self._batches = []


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape as matrices, stacked in one float32 tensor."""
    return torch.stack([tensor.flatten(1).float() for tensor in tensors])


def _multiplied(values: torch.Tensor, bases: torch.Tensor, dim: int) -> torch.Tensor:
    """Each matrix times its basis, on the side of the components."""
    return bases.mT @ values if dim == 0 else values @ bases


def _write(parts: Sequence[Components], values: torch.Tensor) -> None:
    for part, value in zip(parts, values, strict=True):
        part.weight.copy_(value.reshape(part.weight.shape))
