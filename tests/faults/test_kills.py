"""A process that is killed at any point of a save, or finds the disk full, leaves the old or the new, whole."""

import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.training.checkpoints import Position, load_state, prune_steps, save_state

from ..convert.checkpoints import GOLDEN, original
from .readers import small_adapter

resource = pytest.importorskip("resource", reason="Windows has neither fork nor limits")
ROOT = Path(__file__).parents[2]

CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def state(value: float) -> dict:
    return {"weights": {"x": torch.full((2, 3), value)}, "optimizer": {"a": 1}, "schedule": {}, "scaler": None}


def killed_at(call: int, work) -> bool:
    """Run `work` in a child that is killed before its call number `call` to the file system; False where it ended."""
    child = os.fork()
    if child == 0:
        left = call

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*args, **kwargs)

            return wrapper

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_state_is_the_old_or_the_new(tmp_path):
    folder = tmp_path / "x-step00000001-state"
    save_state(folder, state(1.0), Position(step=1))
    call = 0
    while killed_at(call, lambda: save_state(folder, state(2.0), Position(step=2))):
        found, position = load_state(folder)
        assert float(found["weights"]["x"][0, 0]) == position.step
        assert position.step in (1, 2)
        call += 1
    assert call > 6  # it was killed in the middle, not only before
    assert load_state(folder)[1].step == 2
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # the next save removed what the kills left


def test_a_state_that_is_deleted_is_whole_or_gone(tmp_path):
    """Killed in the middle of the removal of old states, a run leaves no half of one under a state's name."""
    states = [tmp_path / f"x-step{step:08d}-state" for step in (1, 2)]
    for step, folder in enumerate(states, start=1):
        save_state(folder, state(float(step)), Position(step=step))
    settings = Namespace(save_last_n_steps=None, save_last_n_steps_state=1, output_name="x", save_model_as=None)
    call = 0
    while killed_at(call, lambda: prune_steps(settings, tmp_path, 3)):
        assert [load_state(folder)[1].step for folder in sorted(tmp_path.glob("x-*"))] in ([1, 2], [2])
        save_state(states[0], state(1.0), Position(step=1))
        call += 1
    assert call > 2
    assert [path.name for path in tmp_path.glob("x-*")] == [states[1].name]


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_an_adapter_is_the_old_or_the_new(form, tmp_path):
    target = tmp_path / ("x.safetensors" if form == "kohya" else "x")
    old, new = (small_adapter(alpha, ("unet",)) for alpha in (1.0, 3.0))
    old.save(target, form)
    call = 0
    while killed_at(call, lambda: new.save(target, form)):
        alphas = {one.alpha for one in Adapter.load(target).modules.values()}
        assert alphas in ({1.0}, {3.0})
        call += 1
    assert call > 2
    assert {one.alpha for one in Adapter.load(target).modules.values()} == {3.0}


@contextmanager
def full_disk(most: int):
    """Files cannot grow beyond so many bytes, as on a full disk: writing fails with an error of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "peft", "state"])
@pytest.mark.parametrize("most", [0, 100, 700])
def test_a_full_disk_leaves_the_old(name, most, tmp_path):
    target = tmp_path / name
    old, new = small_adapter(1.0), small_adapter(3.0)
    if name == "state":
        save_state(target, state(1.0), Position(step=1))
    else:
        old.save(target, "peft" if name == "peft" else "kohya")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    form = "peft" if name == "peft" else "kohya"
    save = (
        (lambda: save_state(target, state(2.0), Position(step=2)))
        if name == "state"
        else (lambda: new.save(target, form))
    )
    with full_disk(most), pytest.raises((AdapterError, TrainingError)) as caught:
        save()
    assert "\n" not in str(caught.value)
    assert str(target) in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_a_merge_that_is_stopped_while_it_writes(stop, tmp_path):
    """The target is as it was; Ctrl-C and SIGTERM leave nothing behind, SIGKILL a file of another name."""
    model, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file({**original("sd1"), "first_stage_model.rest": torch.zeros(150_000_000, dtype=torch.float16)}, model)
    out.write_bytes(b"before")
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, str(ROOT / "convert" / "merge_lora.py"), "--sd_model", str(model), "--save_to", str(out)]
    command += ["--models", str(GOLDEN / "sd15" / "lierla.safetensors")]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # where these tests run in the background of a shell, Ctrl-C is ignored by all that they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while run.poll() is None and sorted(tmp_path.iterdir()) == before:
        time.sleep(0.002)
    run.send_signal(stop)
    _, said = run.communicate()
    assert out.read_bytes() == b"before"
    if stop != signal.SIGKILL:
        assert run.returncode == 1
        assert said.splitlines()[-1].startswith("error: stopped")
        assert sorted(tmp_path.iterdir()) == before
    else:
        assert run.returncode == -stop


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_trainings_killed_at_random(kills, tmp_path):
    """Runs that save at every step, killed at random moments; each goes on from the last state that is there."""
    from tests.train.conftest import build_sd1, draw_images

    model, images = build_sd1(tmp_path / "model"), tmp_path / "images"
    draw_images(images / "1_shape")
    program = ROOT / "train" / "train_network.py"
    out, rng = tmp_path / "out", random.Random(0)
    command = [
        sys.executable, str(program), f"--pretrained_model_name_or_path={model}", f"--train_data_dir={images}",
        "--caption_extension=.txt", "--resolution=64", f"--output_dir={out}", "--network_module=networks.lora",
        "--network_dim=2", "--max_train_steps=100000", "--save_every_n_steps=1", "--save_last_n_steps=3",
        "--save_last_n_steps_state=3", "--save_state", "--output_name=x", "--max_data_loader_n_workers=0", "--seed=1",
    ]  # fmt: skip
    reached = 0
    for _ in range(kills):
        states = sorted(out.glob("x-step*-state"))
        resume = [f"--resume={states[-1]}"] if states else []
        with (tmp_path / "log").open("w") as log:
            run = subprocess.Popen([*command, *resume], stdout=log, stderr=log)
            start = time.monotonic()
            while run.poll() is None and sorted(out.glob("x-step*-state"))[-1:] == states[-1:]:
                assert time.monotonic() - start < 300, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.05)  # until it has begun to train, since imports take most of the time
            time.sleep(rng.uniform(0, 1.5))
            assert run.poll() is None, (tmp_path / "log").read_text()[-2000:]
            run.kill()
            run.wait()
        steps = [load_state(folder)[1].step for folder in sorted(out.glob("x-step*-state"))]
        assert steps
        assert steps[-1] > reached
        reached = steps[-1]
        for file in out.glob("*.safetensors"):
            assert Adapter.load(file).modules
