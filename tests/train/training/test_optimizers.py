import sys

import pytest
import torch

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.lr_schedules import check_schedule
from lora_adapters.train.training.optimizers import (
    KINDS,
    create_optimizer,
    literals,
    optimizer_class,
    optimizer_name,
    start_training,
    weights_to_keep,
)

PACKAGES = {kind.package for kind in KINDS.values()}


def groups(lr: float = 0.1) -> list[dict]:
    torch.manual_seed(0)
    return [{"params": [torch.nn.Parameter(torch.randn(8, 8))], "lr": lr, "name": "unet"}]


def minimise(options: dict, steps: int = 5) -> tuple[float, float]:
    """The sum of squares before some steps, and the smallest after one of them."""
    made = groups(options.get("learning_rate", 0.1))
    optimizer = create_optimizer(settings(**{"learning_rate": 0.1, **options}), made)
    start_training(optimizer)
    weight = made[0]["params"][0]
    before = weight.square().sum().item()
    lowest = before
    for _ in range(steps):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
        with weights_to_keep(optimizer):
            lowest = min(lowest, weight.square().sum().item())
    return before, lowest


@pytest.mark.parametrize("name", [*KINDS, "RAdam", "torch.optim.adamax.Adamax"])
def test_every_optimizer_goes_downhill(name) -> None:
    kind = KINDS.get(name.lower())
    if kind is not None and kind.package:
        pytest.importorskip(kind.module.partition(".")[0])
    if name.startswith("paged") and not torch.cuda.is_available():
        pytest.skip("paged memory is CUDA's")
    rate = 1.0 if name.startswith("dadapt") or name == "prodigy" else 0.01
    before, after = minimise({"optimizer_type": name, "learning_rate": rate}, steps=30)
    assert after < before


def test_arguments_reach_the_optimizer() -> None:
    options = settings(optimizer_args=["weight_decay=0.3", "betas=0.8,0.9"], learning_rate=0.1)
    made = create_optimizer(options, groups())
    assert isinstance(made, torch.optim.AdamW)
    assert made.param_groups[0]["weight_decay"] == 0.3
    assert made.param_groups[0]["betas"] == (0.8, 0.9)
    nesterov = create_optimizer(settings(optimizer_type="SGDNesterov"), groups())
    assert nesterov.param_groups[0]["nesterov"]
    assert nesterov.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_type": "Nadda"}, "there is no Nadda in torch.optim"),
        ({"optimizer_type": "no.such.Class"}, "No module named 'no'"),
        ({"optimizer_args": ["weight_decay"]}, "not of the form key=value"),
        ({"optimizer_args": ["weight_decay=much"]}, "not a Python literal; quote text: weight_decay='...'"),
        ({"optimizer_args": ["amsgrad=true"]}, "not a Python literal; write amsgrad=True"),
        ({"optimizer_args": ["foreach=none"]}, "not a Python literal; write foreach=None"),
        ({"optimizer_args": ["decay=1"]}, "AdamW does not accept these arguments"),
        ({"optimizer_type": "Lion", "use_8bit_adam": True}, "more than one optimizer"),
    ],
)
def test_mistakes(options, message) -> None:
    with pytest.raises(TrainingError, match=message):
        create_optimizer(settings(**options), groups())


def test_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(TrainingError, match="pip install prodigyopt"):
        create_optimizer(settings(optimizer_type="Prodigy"), groups())


def test_prodigy_wants_one_learning_rate() -> None:
    pytest.importorskip("prodigyopt")
    with pytest.raises(TrainingError, match="one learning rate"):
        create_optimizer(settings(optimizer_type="Prodigy"), groups(1.0) + groups(0.5))


def test_adafactor_finds_its_own_rate_unless_told() -> None:
    own = create_optimizer(settings(optimizer_type="AdaFactor"), groups())
    assert own.param_groups[0]["lr"] is None
    told = settings(optimizer_type="AdaFactor", optimizer_args=["relative_step=False"], learning_rate=0.1)
    assert create_optimizer(told, groups()).param_groups[0]["lr"] == 0.1


def test_schedule_free_weights_come_back_bit_for_bit() -> None:
    pytest.importorskip("schedulefree")
    made = groups()
    weight = made[0]["params"][0]
    optimizer = create_optimizer(settings(optimizer_type="AdamWScheduleFree", learning_rate=0.1), made)
    start_training(optimizer)
    for _ in range(3):
        weight.square().sum().backward()
        optimizer.step()
    before = weight.detach().clone()
    with weights_to_keep(optimizer):
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_literals() -> None:
    assert literals(["a=1", "b=True", "c=1e-3", "d='x'"], "optimizer_args") == {"a": 1, "b": True, "c": 1e-3, "d": "x"}


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({"optimizer_type": "AdmW"}, "did you mean AdamW?"),
        ({"optimizer_type": "prodgy"}, "did you mean Prodigy?"),
        ({"optimizer_type": "torch.optim.Adamx"}, "did you mean Adamax?"),
        ({"optimizer_type": "xyz"}, "there is no xyz in torch.optim"),
        ({"lr_scheduler": "cosin"}, "did you mean cosine?"),
    ],
)
def test_what_may_have_been_meant(options, near) -> None:
    asked = settings(**options)
    looked_up = check_schedule if asked.lr_scheduler == "cosin" else lambda one: optimizer_class(optimizer_name(one))
    with pytest.raises(TrainingError) as raised:
        looked_up(asked)
    assert near in str(raised.value)
    assert ("did you mean" in str(raised.value)) == ("did you mean" in near)
