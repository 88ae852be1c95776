"""The sorting step in the trainer: when it comes, what is saved before it, and that it changes nothing else."""

import pytest
import torch

from lora_adapters.convert import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.formats.metadata import DyLora, network_args
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import prepare
from lora_adapters.train.training.sorting import WARM_UP, as_if_sorted, sort_if_due, warmed_up
from lora_adapters.types.layers import factors
from tests.lora_adapters.test_sorting import assert_same_changes
from tests.train.training.test_resume import resumes_exactly

DYLORA = {"network_module": "networks.dylora", "network_args": {"unit": "1"}, "network_dim": 4, "network_alpha": 4}


def weights(run):
    return [factor.weight.detach().clone() for layer in run.layers for factor in factors(layer, "default")]


@pytest.mark.parametrize(
    ("args", "share", "scaling"),
    [
        ({}, 0.3, "constant"),
        ({"sort_at": "0"}, 0, "sqrt"),
        ({"sort_at": "0.6", "freeze_lower": "True"}, 0.6, "constant"),
        ({"rank_scaling": "rank", "rank_sampling": "uniform"}, 0, "rank"),
        ({"rank_scaling": "constant"}, 0.3, "constant"),
    ],
)
def test_the_step_and_the_scale_by_the_options(basics, args, share, scaling) -> None:
    options = {**basics, **DYLORA, "network_args": args, "max_train_steps": 10, "gradient_accumulation_steps": 2}
    run = prepare(settings(**options))
    assert run.sort_step == (round(share * 10) if share else None)
    (dial, _) = run.dials
    batch = next(run.data.batches(0))
    for step in range(10):
        run.tell_step(step, 1, batch)
        drawn = dial.ranks_of_step(len(batch.captions))
        assert drawn == [4] or step >= (run.sort_step or 0)
    adapter = Adapter.from_models(run.trained)
    assert adapter.dylora.rank_scaling == scaling
    written = network_args(adapter.metadata)
    assert written.get("sort_at") == (str(share) if share else None)
    assert written.get("rate_power") == ("0.25" if share else None)
    assert {dial.rates_of for dial in run.dials} == {run.optimizer.optimizer if share else None}


def test_a_schedule_free_optimizer_has_one_rate_for_all_components(basics) -> None:
    pytest.importorskip("schedulefree")
    run = prepare(settings(**{**basics, **DYLORA, "optimizer_type": "AdamWScheduleFree"}))
    assert {(dial.sort_at, dial.rate_power) for dial in run.dials} == {(0.3, 0.0)}


def test_a_scale_that_does_not_fit_is_refused(basics) -> None:
    args = {"sort_at": "0.3", "rank_scaling": "sqrt"}
    with pytest.raises(AdapterError, match="sort_at needs rank_scaling constant"):
        prepare(settings(**{**basics, **DYLORA, "network_args": args}))
    with pytest.raises(AdapterError, match=r"rate_power 0.5 requires sort_at: give sort_at"):
        prepare(settings(**{**basics, **DYLORA, "network_args": {"sort_at": "0", "rate_power": "0.5"}}))


def test_saves_before_and_after_the_sorting_are_sorted(basics, tmp_path) -> None:
    options = {**basics, **DYLORA, "max_train_steps": 3, "save_every_n_steps": 1, "output_name": "x"}
    unsorted = train(settings(**{**options, "network_module": "networks.lora", "network_args": {}}))
    trained = train(
        settings(
            **{**options, "network_args": {"sort_at": 0.9, "rate_power": 0}, "output_dir": str(tmp_path / "dylora")}
        )
    )
    last = trained.adapter
    assert last.dylora == DyLora(1, "constant")
    # The sorting is due after the last step: until then it is a plain LoRA's training.
    assert_same_changes(last, unsorted.adapter, rtol=1e-3, atol=1e-5)
    assert_same_changes(last.truncate(2), unsorted.adapter.svd(2), rtol=1e-3, atol=1e-5)
    for pair in last.modules.values():
        if pair.up.any():
            torch.testing.assert_close(pair.up.flatten(1).norm(dim=0), pair.down.flatten(1).norm(dim=1))
    early = Adapter.load(tmp_path / "dylora" / "x-step00000002.safetensors").truncate(1)
    plain = Adapter.load(tmp_path / "out" / "x-step00000002.safetensors").svd(1)
    assert_same_changes(early, plain, rtol=1e-3, atol=1e-6)


def test_measuring_before_the_sorting_step_changes_nothing(basics) -> None:
    options = {**basics, **DYLORA, "validation_split": 0.25, "max_train_steps": 3, "network_args": {"sort_at": 0.9}}
    options |= {"network_dim": 3, "max_validation_steps": 1, "cache_latents": True}
    often = train(settings(**options, validate_every_n_steps=2))
    once = train(settings(**options, validate_every_n_epochs=9))
    assert often.losses == once.losses
    assert len({measured.loss for measured in often.held_out if measured.step == 2}) == 3


def test_the_moving_average_begins_anew_and_is_saved_sorted(basics, tmp_path) -> None:
    options = {**basics, **DYLORA, "ema_decay": 0.5, "save_every_n_steps": 1, "output_name": "x"}
    options |= {"network_args": {"sort_at": 0.4, "rate_power": 0}}  # until it is sorted it is a plain LoRA then
    train(settings(**options))
    plain = {**options, "network_module": "networks.lora", "network_args": {}, "output_dir": str(tmp_path / "plain")}
    train(settings(**plain))
    early, unsorted = (Adapter.load(tmp_path / name / "x-step00000001-ema.safetensors") for name in ("out", "plain"))
    assert_same_changes(early.truncate(1), unsorted.svd(1), rtol=1e-3, atol=1e-6)
    before, after = (Adapter.load(tmp_path / "out" / f"x-step0000000{step}.safetensors") for step in (2, 3))
    last = Adapter.load(tmp_path / "out" / "x-ema.safetensors")
    for name, pair in last.modules.items():  # two steps after the sorting, of weight 1 and 9/11
        wanted = (2 * before.modules[name].up + 9 * after.modules[name].up) / 11
        torch.testing.assert_close(pair.up, wanted, rtol=1e-3, atol=1e-6)


def test_as_if_sorted_gives_every_bit_back(basics) -> None:
    run = prepare(settings(**{**basics, **DYLORA}))
    torch.manual_seed(0)
    for layer in run.layers:
        factors(layer, "default").up.weight.data.normal_()
    for dial in run.dials:
        dial.unsorted = True
    before = weights(run)
    with as_if_sorted(run):
        assert not any(torch.equal(one, other) for one, other in zip(weights(run), before, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(weights(run), before, strict=True))
    assert all(dial.unsorted for dial in run.dials)
    for dial in run.dials:
        dial.nested_from = 0
    sort_if_due(run, run.sort_step)
    with as_if_sorted(run):
        pass
    assert not any(dial.unsorted for dial in run.dials)


@pytest.mark.parametrize(("optimizer", "restarts"), [("AdamW", False), ("AdamWScheduleFree", True)])
def test_the_rate_comes_back_in_ten_steps_where_the_optimizer_restarts(basics, optimizer, restarts) -> None:
    if restarts:
        pytest.importorskip("schedulefree")
    run = prepare(settings(**{**basics, **DYLORA, "max_train_steps": 100, "optimizer_type": optimizer}))
    rates = []
    for step in (29, *range(30, 45)):
        with warmed_up(run, step):
            rates.append(run.optimizer.param_groups[0]["lr"] / 1e-2)
        assert run.optimizer.param_groups[0]["lr"] == 1e-2
    assert rates == pytest.approx([1, *(share / WARM_UP for share in range(1, 10)), *[1] * 6] if restarts else [1] * 16)


def test_resuming_across_the_sorting_step_gives_the_same_bits(basics, tmp_path) -> None:
    resumes_exactly({**basics, **DYLORA, "max_train_steps": 3, "network_args": {"sort_at": 0.6}}, tmp_path, (1, 2))
