"""The moving average of the weights: --ema_decay."""

from pathlib import Path

import pytest
import torch

from lora_adapters.convert import Adapter
from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.average import WeightAverage, check_average
from lora_adapters.train.training.loop import train
from tests.train.training.test_processes import launch
from tests.train.training.test_resume import WHOLE, same


def decays(count: int, most: float) -> list[float]:
    """Of each step: none before there is a first, then as many of its own as fit."""
    return [0.0, *(min((1 + n) / (10 + n), most) for n in range(1, count))]


def factors(file: Path) -> dict:
    modules = Adapter.load(file).modules
    return {name: torch.cat([pair.down.flatten(), pair.up.flatten()]).double() for name, pair in modules.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_by_its_formula(dtype) -> None:
    """In float32 also of bf16 weights, whose small steps it would not see otherwise."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 4).to(dtype)), torch.nn.Parameter(torch.ones(2).to(dtype))]
    average = WeightAverage(weights, 0.9)
    wanted = [weight.detach().double() for weight in weights]
    for decay in decays(200, 0.9):
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.01)
        average.step()
        wanted = [decay * old + (1 - decay) * w.detach().double() for old, w in zip(wanted, weights, strict=True)]
    kept = [shadow.double() for shadow in average.state_dict()["shadow_params"]]
    torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=1e-6)
    before = [weight.detach().clone() for weight in weights]
    with average.applied():
        torch.testing.assert_close([w.detach() for w in weights], [w.to(dtype) for w in wanted], rtol=1e-2, atol=1e-2)
        assert not torch.equal(weights[0], before[0])
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    average.restart()
    assert torch.equal(average.state_dict()["shadow_params"][0], before[0].float())
    with pytest.raises(ValueError, match="other weights"):
        average.load_state_dict({"shadow_params": [torch.zeros(3)]})


def test_it_is_saved_beside_and_goes_on_exactly(basics, tmp_path) -> None:
    """With gradients accumulated and dropout; the adapter itself is the one of a run without."""
    args = {**WHOLE["network_args"], "sort_at": "0"}  # sorting starts the average anew
    options = {
        **basics,
        **WHOLE,
        "network_args": args,
        "max_train_steps": 4,
        "save_every_n_steps": 1,
        "save_state": True,
        "output_name": "x",
    }
    averaged = train(settings(**options, ema_decay=0.25))
    out = tmp_path / "out"
    wanted = factors(out / "x-step00000001.safetensors")
    for step, decay in enumerate(decays(4, 0.25), start=1):
        now = factors(out / f"x-step{step:08d}.safetensors")
        wanted = {name: decay * old + (1 - decay) * now[name] for name, old in wanted.items()}
        torch.testing.assert_close(factors(out / f"x-step{step:08d}-ema.safetensors"), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors(out / "x-ema.safetensors"), wanted, rtol=1e-5, atol=1e-6)
    state = str(out / "x-step00000002-state")
    again = train(settings(**{**options, "output_dir": str(tmp_path / "again"), "resume": state}, ema_decay=0.25))
    assert same(again.adapter, averaged.adapter)
    assert same(Adapter.load(tmp_path / "again" / "x-ema.safetensors"), Adapter.load(out / "x-ema.safetensors"))
    plain = train(settings(**{**options, "output_dir": str(tmp_path / "plain"), "resume": state}))
    assert same(plain.adapter, averaged.adapter)
    assert not (tmp_path / "plain" / "x-ema.safetensors").exists()


def test_it_is_what_is_measured_and_old_ones_are_removed(basics, tmp_path, caplog) -> None:
    options = {**basics, "validation_split": 0.25, "validate_every_n_steps": 1, "max_train_steps": 4, "seed": 3}
    plain = train(settings(**options))
    nearly_off = train(settings(**options, ema_decay=1e-12, save_every_n_steps=1, save_last_n_steps=1))
    assert [held.loss for held in nearly_off.held_out] == pytest.approx(
        [held.loss for held in plain.held_out], rel=1e-6
    )
    strong = train(settings(**options, ema_decay=1.0))
    assert [held.loss for held in strong.held_out[:2]] == [
        held.loss for held in plain.held_out[:2]
    ]  # one step: the same
    assert strong.held_out[-1].loss != plain.held_out[-1].loss
    assert strong.losses == plain.losses
    kept = sorted(path.name for path in (tmp_path / "out").glob("at-step*"))
    assert kept == [f"at-step{step:08d}{ema}.safetensors" for step in (3, 4) for ema in ("-ema", "")]


def test_a_state_without_one_begins_it(basics, tmp_path, caplog) -> None:
    train(settings(**basics, save_state_on_train_end=True))
    options = {**basics, "output_dir": str(tmp_path / "on"), "resume": str(tmp_path / "out" / "last-state")}
    train(settings(**{**options, "max_train_steps": 4}, ema_decay=0.5))
    assert "the average starts at this step" in caplog.text
    on = tmp_path / "on"
    torch.testing.assert_close(factors(on / "last-ema.safetensors"), factors(on / "last.safetensors"))


def test_schedule_free_optimizers_have_their_own() -> None:
    class ScheduleFree(torch.optim.SGD):
        def eval(self) -> None: ...

    with pytest.raises(OptionError, match="ScheduleFree already averages the weights"):
        check_average(settings(ema_decay=0.9), ScheduleFree)
    check_average(settings(ema_decay=0.9), torch.optim.SGD)


@pytest.mark.slow
def test_two_processes_have_the_average_of_one(basics, tmp_path) -> None:
    options = {**basics, "ema_decay": 0.5, "cache_latents": True, "learning_rate": 1e-3}
    train(settings(**options))
    both = {**options, "train_batch_size": 1, "output_dir": str(tmp_path / "two")}
    finished = launch(both)
    assert finished.returncode == 0, finished.stderr[-3000:]
    one, two = (factors(tmp_path / folder / "last-ema.safetensors") for folder in ("out", "two"))
    for name, value in one.items():
        assert float((value - two[name]).abs().max()) < 1e-3 * float(value.abs().max())
