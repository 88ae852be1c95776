"""Steps of an optimizer in the basis in which its weights began."""

import copy

import pytest
import torch
from torch import nn

from lora_adapters.component_steps import Components, ComponentSteps, change_of_basis, keep_bases
from lora_adapters.convert.errors import AdapterError
from lora_adapters.optimizer_state import BASIS


def test_the_basis_between_the_columns_of_factors() -> None:
    torch.manual_seed(0)
    before, basis = torch.randn(10, 4), torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(change_of_basis(before, before.double() @ basis), basis)
    assert change_of_basis(before[:3], 2 * before[:3]) is None  # fewer rows than columns
    assert change_of_basis(torch.zeros(10, 4), torch.zeros(10, 4)).equal(torch.eye(4, dtype=torch.float64))
    assert change_of_basis(before, torch.zeros(10, 4)) is None
    assert change_of_basis(before, before * torch.tensor([1, 1, 1, 0])) is None  # a component is lost
    assert change_of_basis(before, torch.randn(10, 4)) is None  # they do not mean the same


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rates", [None, torch.tensor([2.0, 1.0, 0.5])])
def test_a_step_is_that_of_the_weight_before_two_changes_of_basis(dim: int, rates: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    start, first, second = torch.randn(7, 3), torch.randn(3, 3), torch.randn(3, 3)
    target = torch.randn(7, 3)
    own = nn.Parameter(start.clone())  # is stepped as it is, and loses through both changes of basis
    of_own = torch.optim.AdamW([own], lr=0.1, weight_decay=0.1)
    if rates is not None:
        ComponentSteps(of_own).add([Components(own, 1, rates)])
    turned = nn.Parameter(start.T.clone() if dim == 0 else start.clone())
    optimizer = torch.optim.AdamW([turned], lr=0.1, weight_decay=0.1)
    steps, part = ComponentSteps(optimizer), Components(turned, dim, rates)
    steps.add([part])
    basis = torch.eye(3)
    for step in range(9):
        if step in (3, 6):
            before, change = turned.detach().clone(), (first, second)[step // 3 - 1]
            columns = part.columns(before) @ change
            turned.data = (columns.T if dim == 0 else columns).contiguous()
            basis = basis @ change
            assert not keep_bases(optimizer, [part], [before])
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a resumed training does
        (own @ basis - target).square().sum().backward()
        (part.columns(turned) - target).square().sum().backward()
        gradient = turned.grad
        for each in (of_own, optimizer):
            each.step()
        assert turned.grad is gradient
        for each in (of_own, optimizer):
            each.zero_grad()
        torch.testing.assert_close(part.columns(turned), own @ basis, rtol=1e-4, atol=1e-4)
    assert BASIS in optimizer.state[turned]


def test_a_closure_is_refused_and_a_weight_without_gradient_left_alone() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    steps, part = ComponentSteps(optimizer), Components(weight, 1)
    steps.add([part])
    assert not keep_bases(optimizer, [part], [weight.detach().clone()])  # no step has been taken yet
    assert not optimizer.state
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    weight.data = before @ torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert not keep_bases(optimizer, [part], [before])
    with pytest.raises(AdapterError, match=r"call step\(\) without one"):
        optimizer.step(lambda: 0.0)
    optimizer.zero_grad()
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)
