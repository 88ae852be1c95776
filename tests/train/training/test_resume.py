"""A run that was stopped and resumed ends with the same adapter, bit for bit, as one that never was."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lora_adapters.convert import Adapter
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.checkpoints import Position, load_state, save_state
from lora_adapters.train.training.loop import train

PROGRAM = Path(__file__).parents[3] / "train" / "train_network.py"
WHOLE = {
    "network_module": "networks.dylora",
    "network_dim": 4,
    "network_args": {"unit": "2", "conv_dim": "4"},
    "network_dropout": 0.1,
    "lr_scheduler": "cosine",
    "max_train_steps": 6,
    "gradient_accumulation_steps": 2,
    "caption_dropout_rate": 0.3,
    "flip_aug": True,
}


def same(first: Adapter, second: Adapter) -> bool:
    """Whether two adapters have the same modules with the same bits."""
    return first.modules.keys() == second.modules.keys() and all(
        torch.equal(one.down, second.modules[name].down) and torch.equal(one.up, second.modules[name].up)
        for name, one in first.modules.items()
    )


OPTIMIZERS = {
    "AdamWScheduleFree": ("schedulefree", {"optimizer_args": ["warmup_steps=2"]}),
    "Prodigy": ("prodigyopt", {"learning_rate": 1.0}),
    "AdamW8bit": ("bitsandbytes", {}),
    "AdaFactor": ("transformers", {}),
}


def resumes_exactly(options: dict, tmp_path: Path, steps: tuple[int, ...]) -> None:
    options = {**options, "save_every_n_steps": 1, "save_state": True, "output_name": "x"}
    whole = train(settings(**options))
    for step in steps:
        state = tmp_path / "out" / f"x-step{step:08d}-state"
        resumed = train(settings(**{**options, "output_dir": str(tmp_path / f"again{step}"), "resume": str(state)}))
        assert resumed.losses == whole.losses[step:]
        assert same(resumed.adapter, whole.adapter)


def test_resuming_gives_the_same_bits(basics, tmp_path) -> None:
    resumes_exactly({**basics, **WHOLE, "max_train_steps": 4}, tmp_path, (3,))  # an epoch has two steps


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_every_optimizer(basics, tmp_path, optimizer) -> None:
    package, options = OPTIMIZERS[optimizer]
    pytest.importorskip(package)
    resumes_exactly({**basics, **WHOLE, "optimizer_type": optimizer, **options}, tmp_path, (2, 3))


def test_state_says_where_it_was(basics, tmp_path) -> None:
    train(settings(**basics, save_state_on_train_end=True))
    facts = json.loads((tmp_path / "out" / "last-state" / "train_state.json").read_text())
    assert (facts["current_step"], facts["current_epoch"], facts["batch"]) == (3, 0, 3)


def test_resume_refuses_another_network(basics, tmp_path) -> None:
    train(settings(**basics, save_state_on_train_end=True))
    with pytest.raises(TrainingError, match="other network options"):
        train(settings(**{**basics, "network_dim": 3}, resume=str(tmp_path / "out" / "last-state")))


def test_resume_of_no_state(basics, tmp_path) -> None:
    with pytest.raises(TrainingError, match="not a saved state"):
        train(settings(**basics, resume=str(tmp_path)))


def test_failed_write_leaves_the_old_state(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "x-state"
    others: dict = {"optimizer": {}, "schedule": {}}
    save_state(folder, {"weights": {"a": torch.ones(2)}, **others}, Position(step=1))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(TrainingError, match="No space left on device"):
        save_state(folder, {"weights": {"a": torch.zeros(2)}, **others}, Position(step=2))
    state, position = load_state(folder)
    assert position.step == 1
    assert torch.equal(state["weights"]["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["x-state"]


def command_line(options: dict) -> list[str]:
    """The same options for the program."""
    words = []
    for name, value in options.items():
        if name == "network_args":
            words += ["--network_args", *(f"{key}={text}" for key, text in value.items())]
        elif value is True:
            words.append(f"--{name}")
        else:
            words.append(f"--{name}={value}")
    return words


@pytest.mark.slow
def test_killed_in_a_save_and_resumed(basics, tmp_path) -> None:
    """kill -9 hits the program while it writes a state; going on from the last whole one gives the same adapter."""
    options = {**basics, **WHOLE, "save_every_n_steps": 1, "save_state": True, "output_name": "x"}
    whole = train(settings(**{**options, "output_dir": str(tmp_path / "whole")}))
    slow_save = (
        "import sys, time, torch; sys.argv[0] = 'train'; plain = torch.save; calls = []\n"
        "def save(state, file):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        file.write(b'half'); file.flush(); print('SAVING', flush=True); time.sleep(600)\n"
        "    return plain(state, file)\n"
        "torch.save = save\n"
        "from lora_adapters.train.train_network import main; main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", slow_save, *command_line(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    deadline = time.time() + 120
    while time.time() < deadline and "SAVING" not in process.stdout.readline():
        pass
    process.kill()
    process.wait()
    out = tmp_path / "out"
    states = sorted(path.name for path in out.glob("x-*-state"))
    assert states == ["x-step00000001-state", "x-step00000002-state"]
    assert list(out.glob(".*.partial")), "the kill came during the save"
    resumed = train(settings(**options, resume=str(out / states[-1])))
    assert same(resumed.adapter, whole.adapter)
    assert not list(out.glob(".*.partial")), "what the kill left half-written is removed"
