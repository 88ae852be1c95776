"""The study's own arithmetic, on the tiny base model with two steps of training."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora.layer import LoraLayer

sys.path.insert(0, str(Path(__file__).parent))

import rank_study
from study import methods, report, training
from study.tasks import BASE, Examples, Task

from lora_adapters import set_rank


@pytest.fixture(scope="module")
def unet():
    return UNet2DConditionModel.from_pretrained(BASE / "unet").float().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(0)
    return Examples(torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 128, generator=generator))


def random_up(live, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for layer in live.modules():
        if isinstance(layer, LoraLayer):
            up = layer.lora_B[methods.ADAPTER].weight
            up.data = torch.randn(up.shape, generator=generator) * 0.02


@pytest.mark.parametrize("scaling", ["constant", "rank"])
def test_the_measured_rank_is_that_of_the_live_model(unet, examples, scaling, monkeypatch):
    monkeypatch.setattr(training, "NOISES", 1)
    live = UNet2DConditionModel.from_pretrained(BASE / "unet").float()
    method = methods.Method("ours", settings={"rank_scaling": scaling})
    adapter_of = method.put_on(live, 0, None).adapter
    random_up(live)
    live.eval()
    for rank in (2, 16):
        set_rank(live, rank)
        with training.merged(unet, adapter_of().truncate(rank)):
            measured = training.held_out_loss(unet, examples)
        assert measured == pytest.approx(training.held_out_loss(live, examples), rel=1e-4)


def test_merging_leaves_no_trace(unet):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    live = UNet2DConditionModel.from_pretrained(BASE / "unet").float()
    adapter = methods.Method("plain r2", (2,), {"r": 2}, "plain").put_on(live, 0, None).adapter
    random_up(live)
    with training.merged(unet, adapter()):
        assert any(not torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


def test_a_run_is_the_same_twice_and_lowers_the_loss(unet, examples, monkeypatch):
    monkeypatch.setattr(training, "NOISES", 1)
    task = Task("style", examples, examples)
    method = methods.Method("plain r16", (16,), {"r": 16}, "plain")
    first, adapter = training.run(unet, method, task, 3e-3, 0, 3, None)
    second, _ = training.run(unet, method, task, 3e-3, 0, 3, None)
    assert first["losses"] == second["losses"]
    assert first["losses"][16] < training.held_out_loss(unet, examples)
    assert set(first["svd"]) == {1, 2, 4, 8}
    assert adapter.rank == 16


def record(method, lr, seed, losses, svd=None):
    return {"task": "style", "method": method, "lr": lr, "seed": seed, "losses": losses, "svd": svd or {}}


def test_only_runs_at_the_best_rate_of_the_first_seed_count():
    runs = [
        record("ours constant", 1e-3, 0, {"1": 0.3, "16": 0.1}),
        record("ours constant", 2e-3, 0, {"1": 0.2, "16": 0.1}),
        record("ours constant", 2e-3, 1, {"1": 0.24, "16": 0.12}),
        record("plain r1", 1e-3, 0, {"1": 0.2}),
        record("plain r1", 1e-3, 1, {"1": 0.2}),
        record("plain r16", 1e-3, 0, {"16": 0.1}, {"1": 0.25}),
    ]
    losses, rates = report.collected(runs, [0, 1])
    assert rates["style"]["ours constant"] == 2e-3
    assert losses["style", "ours constant", 1] == [0.2, 0.24]
    assert losses["style", report.CUT, 1] == [0.25]
    assert losses["style", report.CUT, 16] == [0.1]
    assert report.against_plain(losses, "style", "ours constant", 1) == pytest.approx([0.0, 0.2])
    table = report.table(losses, rates, [], {"style": 0.5, "subject": 0.6})
    assert "| ours constant | 0.2200 ±0.0283 (+10.0%) |" in table
    assert "subject" not in table  # which nothing was run on


def test_the_third_rate_lies_beyond_the_better_one():
    assert rank_study.further(1e-3, [1e-3, 2e-3]) == pytest.approx(5e-4)
    assert rank_study.further(2e-3, [1e-3, 2e-3]) == pytest.approx(4e-3)


def test_results_of_another_base_model_are_refused(tmp_path):
    (tmp_path / "about.json").write_text('{"base": "0", "steps": 150}')
    with pytest.raises(SystemExit, match="another base model"):
        rank_study.prepare(tmp_path, BASE, 150)


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch):
    job = rank_study.Job("style", methods.Method("plain r1", (1,), {"r": 1}, "plain"), 1e-3, 0)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{job.stem()}.json").write_text(json.dumps(record("plain r1", 1e-3, 0, {"1": 0.1})))
    monkeypatch.setattr(rank_study, "ProcessPoolExecutor", lambda *_: pytest.fail("it was run again"))
    rank_study.finish([job], tmp_path, None)


def test_a_third_rate_is_tried_for_every_method_on_every_task(tmp_path, monkeypatch):
    tried = []

    def finish(jobs, out, args):
        for job in jobs:
            losses = {str(rank): 0.1 + abs(job.lr - 4e-3) for rank in job.method.ranks}
            made = {**record(job.method.name, job.lr, job.seed, losses), "task": job.task}
            (out / "runs" / f"{job.stem()}.json").write_text(json.dumps(made))
            tried.append((job.task, job.method.name, job.lr, job.seed))

    monkeypatch.setattr(rank_study, "finish", finish)
    monkeypatch.setattr(rank_study, "prepare", lambda out, *_: (out / "runs").mkdir())
    monkeypatch.setattr(report, "write", lambda *_: (tmp_path / "table.md").write_text(""))
    options = ["--out", str(tmp_path), "--third", "--only", "sqrt spread", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["rank_study.py", *options])
    rank_study.main()
    first = [(task, "ours sqrt spread", lr, 0) for lr in (2e-3, 4e-3, 8e-3) for task in ("style", "subject")]
    assert set(tried) == {*first, *((task, "ours sqrt spread", 4e-3, 1) for task in ("style", "subject"))}
