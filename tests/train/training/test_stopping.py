"""Ctrl-C, SIGTERM and SIGHUP end a run after its step with a state, from which it continues to the same bits."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_adapters.train.objective.step_loss import StepLoss
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.stopping import SIGNALS, Interrupted, StopSignals, signalled
from lora_adapters.train.train_network import main
from lora_adapters.train.training.loop import train
from tests.train.training.test_processes import ENVIRONMENT, command
from tests.train.training.test_resume import WHOLE, command_line, same

NAMES = ["SIGINT", "SIGTERM", "SIGHUP"]


def raise_in_step(monkeypatch, number: int, step: int, times: int = 1) -> None:
    """The process gets the signal in the middle of a step (from 1)."""
    plain, calls = StepLoss.training, []

    def signalling(self, batch):
        calls.append(1)
        if len(calls) == step:
            for _ in range(times):
                signal.raise_signal(number)
        return plain(self, batch)

    monkeypatch.setattr(StepLoss, "training", signalling)


@pytest.mark.parametrize("name", NAMES)
def test_the_program_saves_and_says_so(basics, tmp_path, monkeypatch, capfd, name) -> None:
    number = getattr(signal, name)
    raise_in_step(monkeypatch, number, 2)
    assert main(command_line({**basics, "output_name": "x"})) == 128 + number
    said = capfd.readouterr().err
    state = tmp_path / "out" / "x-step00000002-state"
    assert f"{name}: stopping after this step" in said
    assert said.strip().endswith(f"error: stopped by {name}; the state is saved, continue with --resume={state}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "x-report.html",
        "x-step00000002-state",
        "x-step00000002.safetensors",
    ]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stopped_run_continues_to_the_same_bits(basics, tmp_path, monkeypatch) -> None:
    options = {**basics, **WHOLE, "max_train_steps": 4, "output_name": "x"}
    whole = train(settings(**{**options, "output_dir": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        raise_in_step(patch, signal.SIGTERM, 5)  # an epoch has two steps of two batches: in the third step
        with pytest.raises(Interrupted) as stopped:
            train(settings(**options))
    resumed = train(settings(**options, resume=stopped.value.resume_from))
    assert resumed.losses == whole.losses[3:]
    assert same(resumed.adapter, whole.adapter)


def test_the_second_signal_stops_at_once(basics, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr("lora_adapters.train.stopping.SAME", 0)
    raise_in_step(monkeypatch, signal.SIGTERM, 2, times=2)
    assert main(command_line(basics)) == 143
    assert "stopped by SIGTERM; saved files and states are whole" in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_signal_that_comes_twice_at_once_is_one(basics, tmp_path, monkeypatch) -> None:
    """A batch system signals every process, and the launcher passes on its own."""
    raise_in_step(monkeypatch, signal.SIGTERM, 2, times=2)
    assert main(command_line({**basics, "output_name": "x"})) == 143
    assert (tmp_path / "out" / "x-step00000002-state").is_dir()


def test_before_training_a_signal_stops_at_once(basics, monkeypatch, capfd) -> None:
    monkeypatch.setattr(
        "lora_adapters.train.training.setup.load_base_models", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    assert main(command_line(basics)) == 143
    assert "error: stopped by SIGTERM" in capfd.readouterr().err


def test_in_the_last_step_the_run_ends_as_always(basics, monkeypatch) -> None:
    raise_in_step(monkeypatch, signal.SIGTERM, 3)
    assert main(command_line(basics)) == 0


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.asked == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_trains_without_handlers() -> None:
    found = []

    def work() -> None:
        with StopSignals() as signals:
            found.append(signals.before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [{}]


def test_a_signal_of_one_process_is_every_process_s() -> None:
    signals = StopSignals()
    quiet = signals.flags("cpu")
    assert signalled(quiet.tolist()) == 0
    for number in SIGNALS:
        signals.asked = number
        assert signalled(((quiet + signals.flags("cpu")) / 2).tolist()) == number


def started_step(log: Path, process: subprocess.Popen) -> None:
    """Wait until the bar shows a step."""
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None and "epoch=" not in log.read_text(errors="replace"):
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["launcher", "one process"])
def test_two_processes_stop_together(basics, tmp_path, who) -> None:
    """The launcher passes SIGTERM on to its processes; and one that gets it alone takes the other one along."""
    options = {**basics, "max_train_steps": 5000, "train_batch_size": 1, "cache_latents": True, "output_name": "x"}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command(options), stdout=file, stderr=file, env=ENVIRONMENT)
    started_step(log, process)
    if who == "launcher":
        process.send_signal(signal.SIGTERM)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
    assert process.wait(120) != 0
    said = log.read_text(errors="replace")
    (state,) = (tmp_path / "out").glob("x-step*-state")
    assert f"continue with --resume={state}" in said, said[-3000:]
    step = int(state.name[len("x-step") : -len("-state")])
    resumed = train(settings(**{**options, "train_batch_size": 2, "max_train_steps": step + 1}, resume=str(state)))
    assert len(resumed.losses) == 1


@pytest.mark.slow
def test_loading_processes_do_not_end_at_a_signal_to_the_group(basics, tmp_path) -> None:
    """Batch systems signal every process of a job, loading processes too."""
    options = {**basics, "max_train_steps": 5000, "max_data_loader_n_workers": 2, "output_name": "x"}
    log = tmp_path / "log"
    program = [sys.executable, "-m", "lora_adapters.cli", "train", *command_line(options)]
    with log.open("w") as file:
        process = subprocess.Popen(program, stdout=file, stderr=file, start_new_session=True)
    started_step(log, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(120) == 143, log.read_text()[-3000:]
    assert len(list((tmp_path / "out").glob("x-step*-state"))) == 1
    assert "killed by signal" not in log.read_text()
