"""What is seen while a run trains."""

import contextlib
import logging
from types import SimpleNamespace

import pytest

from lora_adapters.convert.terminal import be_quiet, own_quiet
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.checkpoints import Position
from lora_adapters.train.training.progress import Progress
from lora_adapters.train.training.step_values import StepValues
from lora_adapters.train.training.trackers import console


@pytest.fixture
def run(tmp_path):
    accelerator = SimpleNamespace(is_local_main_process=True, is_main_process=True)
    asked = settings(pretrained_model_name_or_path="x", output_dir=str(tmp_path), network_module="networks.lora")
    return SimpleNamespace(steps=4, epochs=2, steps_per_epoch=2, accelerator=accelerator, settings=asked)


def test_messages_have_lines_of_their_own(run, capsys):
    run.settings.console_log_simple = True
    log = logging.getLogger("lora_adapters.train.training.saving")
    with console(run.settings):
        with Progress(run, 0) as progress:
            progress.bar.update()
            log.info("saved mine.safetensors")
        log.info("done")
    shown = capsys.readouterr()
    lines = [
        line for line in (shown.out + shown.err).replace("\r", "\n").splitlines() if "mine" in line or "done" in line
    ]
    assert lines == ["saved mine.safetensors", "done"]


def test_the_epoch_is_none_beyond_the_last(run, capsys):
    run.optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}])
    for epoch, shown in ((0, 1), (1, 2), (2, 2)):
        with Progress(run, 0) as progress:
            progress.stepped(Position(step=1, epoch=epoch), StepValues(0.5, 0, {}))
        assert f"epoch={shown}," in capsys.readouterr().err


def test_held_out_losses_are_named_by_rank(run, capsys):
    with Progress(run, 0) as progress:
        progress.held_out(3, {"loss/validation_rank4": 0.25, "loss/validation_rank16": 0.125})
        progress.held_out(4, {"loss/validation": 0.5})
    said = capsys.readouterr().out
    assert "step 3: held-out loss rank 4: 0.25000, rank 16: 0.12500\nstep 4: held-out loss 0.50000" in said


def test_quiet(run, capsys):
    with own_quiet():
        be_quiet()
        with console(run.settings), Progress(run, 0) as progress:
            progress.held_out(4, {"loss/validation": 0.5})
            logging.getLogger("lora_adapters").info("saved")
            logging.getLogger("lora_adapters").warning("odd")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith("WARNING lora_adapters: odd\n")
    assert shown.err.count("\n") == 1


def test_libraries_say_warnings_only(run, capsys):
    with console(run.settings):
        for name in ("diffusers.models", "PIL.PngImagePlugin", "httpx", "httpx2"):
            logging.getLogger(name).info("a detail")
        logging.getLogger("lora_adapters").info("a step")
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
    assert capsys.readouterr().err.endswith("INFO lora_adapters: a step\n")


@pytest.mark.parametrize("file", [None, "log"])
def test_logging_is_afterwards_as_it_was(run, tmp_path, file):
    """A process may go on when the program ends, with another console, or none."""
    run.settings.console_log_file = file and str(tmp_path / file)
    root, library = logging.getLogger(), logging.getLogger("httpx")
    before = root.handlers[:], root.level, library.level
    with contextlib.suppress(ZeroDivisionError), console(run.settings):
        assert root.handlers[:] != before[0]
        raise ZeroDivisionError
    assert (root.handlers[:], root.level, library.level) == before
