import math

import pytest
import torch

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.lr_schedules import as_steps, check_schedule, create_schedule


def rates(steps: int = 10, **options) -> list[float]:
    """The learning rate of each of the steps, as a share of the full one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_schedule(settings(**options), optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def half_cosine(t: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))


def test_constant_and_warm_up_as_count_share_and_percentage() -> None:
    assert rates() == [1.0] * 10
    expected = [0, 0.5] + [1] * 8
    for warmup in (2, 0.2):
        assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=warmup) == pytest.approx(expected)
    assert as_steps(0.25, 10) == 2
    assert as_steps(3, 10) == 3


def test_linear_cosine_polynomial() -> None:
    assert rates(lr_scheduler="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates(lr_scheduler="cosine") == pytest.approx([half_cosine(i / 10) for i in range(10)])
    quadratic = rates(lr_scheduler="polynomial", lr_scheduler_power=2)
    assert quadratic == pytest.approx([(1 - i / 10) ** 2 for i in range(10)], abs=1e-6)


def test_restarts_and_floors() -> None:
    restarts = rates(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2)
    assert restarts == pytest.approx([half_cosine(i % 5 / 5) for i in range(10)])
    floor = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.1)
    assert floor == pytest.approx([0.1 + 0.9 * half_cosine(i / 10) for i in range(10)])


def test_inverse_sqrt_and_stable_decay() -> None:
    slow = rates(lr_scheduler="inverse_sqrt", lr_warmup_steps=1, lr_scheduler_timescale=4)
    assert slow[1:] == pytest.approx([1 / math.sqrt((i + 4 - 1) / 4) for i in range(1, 10)])
    stable = rates(lr_scheduler="warmup_stable_decay", lr_warmup_steps=2, lr_decay_steps=0.3)
    assert stable[:7] == pytest.approx([0, 0.5, 1, 1, 1, 1, 1])
    assert stable[7] == 1
    assert 1 > stable[8] > stable[9] > 0


def test_piecewise_and_classes() -> None:
    rules = ["step_rules='1:3,0.1:6,0.01'"]
    found = rates(lr_scheduler="piecewise_constant", lr_scheduler_args=rules)
    assert found == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 4)
    steps = rates(lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=5", "gamma=0.5"])
    assert steps == pytest.approx([1] * 5 + [0.5] * 5)
    dotted = rates(lr_scheduler_type="torch.optim.lr_scheduler.ConstantLR", lr_scheduler_args=["factor=0.25"])
    assert dotted[0] == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "cosin"}, "not one of linear, cosine"),
        ({"lr_warmup_steps": 5}, "constant has no warm-up"),
        ({"lr_scheduler": "adafactor:0.1"}, "is for --optimizer_type AdaFactor"),
    ],
)
def test_mistakes(options, message) -> None:
    with pytest.raises(TrainingError, match=message):
        check_schedule(settings(**options))


def test_decay_longer_than_the_run() -> None:
    with pytest.raises(TrainingError, match="longer than the run"):
        rates(lr_scheduler="warmup_stable_decay", lr_warmup_steps=8, lr_decay_steps=8)


def test_adafactor_schedule() -> None:
    from lora_adapters.train.training.optimizers import create_optimizer

    options = settings(optimizer_type="AdaFactor", lr_scheduler="adafactor:0.25")
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0, "name": "unet"}
    schedule = create_schedule(options, create_optimizer(options, [group]), 10)
    assert schedule.get_lr() == [0.25]
