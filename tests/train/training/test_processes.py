"""Two processes through accelerate give what one process with the same total batch gives."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_adapters.convert import Adapter
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training import trackers
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.trackers import end_trackers
from tests.train.training.test_resume import PROGRAM, command_line


def test_shares_of_a_batch_have_its_loss(basics) -> None:
    """The mean over two processes of their losses is the loss of one process with the same total batch."""
    from lora_adapters.train.training.setup import prepare

    run = prepare(settings(**basics))
    whole = next(run.data.batches(0, world_size=1))
    run.data = None  # free the loader
    halves = prepare(settings(**{**basics, "train_batch_size": 1})).data
    parts = [next(halves.batches(0, rank=rank, world_size=2)) for rank in (0, 1)]
    losses = [run.loss.training(part) for part in parts]
    torch.testing.assert_close(sum(losses) / 2, run.loss.training(whole))


def command(options: dict) -> list[str]:
    """The program in two processes, as a command."""
    started = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    started += ["--num_cpu_threads_per_process=1", f"--main_process_port={29500 + os.getpid() % 400}"]
    return [*started, str(PROGRAM), *command_line(options)]


# accelerate's own way to start several processes on CPUs needs MPI; its way for GPUs does without.
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true"}


def launch(options: dict) -> subprocess.CompletedProcess:
    return subprocess.run(command(options), capture_output=True, text=True, timeout=300, check=False, env=ENVIRONMENT)


def test_sdxl_with_default_options(basics, sdxl) -> None:
    """Its first text encoder's last layer is never read: waiting for its gradients would end the run at step 2."""
    options = {**basics, "pretrained_model_name_or_path": str(sdxl), "train_batch_size": 1, "cache_latents": True}
    finished = launch(options)
    assert finished.returncode == 0, finished.stderr[-3000:]
    adapter = Adapter.load(Path(basics["output_dir"]) / "last.safetensors")
    changed = {name.path for name, one in adapter.modules.items() if name.component == "text_encoder" and one.up.any()}
    assert {path.split(".")[3] for path in changed} == {"0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("sd1", {"clip_skip": 2}),
        ("sd1", {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_train_epochs": 2}),
        ("sd1", {"network_dropout": 0.1, "ddp_static_graph": True, "ddp_gradient_as_bucket_view": True}),
        ("sdxl", {"network_args": {"conv_dim": "2"}, "gradient_checkpointing": True}),
        ("sdxl", {"network_module": "networks.dylora", "network_args": {"unit": "1", "conv_dim": "2"}}),
    ],
)
def test_other_kinds_in_two_processes(basics, request, model, changes) -> None:
    path = str(request.getfixturevalue(model))
    finished = launch({**basics, "pretrained_model_name_or_path": path, "train_batch_size": 1, **changes})
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (Path(basics["output_dir"]) / "last.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sort_at", ["0", "0.3"])  # 0.3: components are sorted before the second of four steps
def test_two_processes_equal_one(basics, tmp_path, sort_at) -> None:
    options = {
        **basics,
        "network_module": "networks.dylora",
        "network_args": {"unit": "1", "sort_at": sort_at},
        "validation_split": 0.25,
        "max_train_steps": 4,
        "cache_latents": True,
        "save_state": True,
    }
    one = train(settings(**options))
    two = {**options, "train_batch_size": 1, "output_dir": str(tmp_path / "two")}
    finished = launch(two)
    assert finished.returncode == 0, finished.stderr[-3000:]
    line = next(line for line in reversed(finished.stdout.splitlines()) if "held-out" in line)
    shown = [float(text) for text in re.findall(r"rank ?\d+:? (\d\.\d+)", line)]
    assert shown == pytest.approx([measured.loss for measured in one.held_out if measured.step == 4], abs=2e-5)
    adapter = Adapter.load(Path(two["output_dir"]) / "last.safetensors")
    for name, expected in one.adapter.modules.items():
        # Components that are equally large, as after one step, are told apart by rounding: others are cut then.
        atol = 2e-5 if sort_at == "0" else 1e-4
        torch.testing.assert_close(adapter.modules[name].delta(), expected.delta(), rtol=1e-3, atol=atol)
        if sort_at == "0":  # else rounding is larger in the factors of small components than in what they do
            torch.testing.assert_close(adapter.modules[name].up, expected.up, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(adapter.modules[name].down, expected.down, rtol=1e-3, atol=1e-4)


def test_a_process_group_is_not_freed_by_the_models_that_were_trained_with_it(tmp_path) -> None:
    """Else a run in several processes may never end, once in a few hundred runs."""
    distributed = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    group = distributed.group.WORLD
    end_trackers(SimpleNamespace(end_training=distributed.destroy_process_group))
    assert not distributed.is_initialized()
    assert any(kept is group for kept in trackers._ended_groups)
