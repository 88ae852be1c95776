"""Every program runs by one function: exit statuses, messages, signals, names."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_adapters import cli
from lora_adapters.convert.errors import AdapterError, OneLineError, UsageError
from lora_adapters.convert.tools.command_line import Parser, called_as, run
from lora_adapters.convert.tools.launchers import NOTICE
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.stopping import Interrupted

NO_ROOM = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"


def raising(error: BaseException):
    def program(argv: object) -> None:
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (AdapterError("a.safetensors: no LoRA"), 1, "a.safetensors: no LoRA"),
        (TrainingError("no images"), 1, "no images"),
        (UsageError("--a needs --b"), 2, "--a needs --b"),
        (OptionError("--a needs --b"), 2, "--a needs --b"),
        (OneLineError("tab\there \x1b[2J"), 1, r"tab here \x1b[2J"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 1, "x.png: No such file or directory"),
        (OSError("the Hub is away"), 1, "the Hub is away"),
        (BrokenPipeError(32, "Broken pipe"), 1, "[Errno 32] Broken pipe"),  # a tracker's, not that of the output
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "the device has too little memory: use --device cpu"),
        (MemoryError(), 1, "there is too little memory"),
        (RuntimeError(NO_ROOM), 1, "there is too little memory"),
        (RuntimeError("a shape\ndetails"), 1, "a shape"),
        (KeyboardInterrupt(), 1, "stopped; nothing was written"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM; saved files and states are whole"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_status_and_message_of_each_error(capsys, error, status, message) -> None:
    assert run(raising(error), []) == status
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_faults_of_a_program_keep_their_traceback(capsys) -> None:
    with pytest.raises(TypeError):
        run(raising(TypeError("x")), [])
    with pytest.raises(RuntimeError):
        run(raising(RuntimeError("x")), [], traceback=True)
    assert run(raising(RuntimeError(NO_ROOM)), [], traceback=True) == 1
    assert run(raising(torch.OutOfMemoryError("x")), [], traceback=True, memory="try less") == 1
    assert capsys.readouterr().err.endswith("the device has too little memory: try less\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_stop_as_ctrl_c_does_and_handlers_come_back(capsys, name) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip("this system does not have the signal")
    before = signal.getsignal(number)
    assert run(lambda argv: signal.raise_signal(number), [], stopped="stopped; go on") == 1
    assert capsys.readouterr().err == "error: stopped; go on\n"
    assert signal.getsignal(number) == before


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(unbuffered) -> None:
    code = (
        "import sys; from lora_adapters.convert.tools.command_line import run\n"
        "sys.exit(run(lambda argv: (sys.stdin.read(), print('x')), []))"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, env=environment, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (1, b"")


def test_notices_are_not_shown_and_the_environment_is_left(monkeypatch) -> None:
    backends = logging.getLogger("bitsandbytes.backends")
    monkeypatch.setattr(backends, "level", logging.NOTSET)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert run(lambda argv: None, []) == 0
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    cpu = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not cpu.isEnabledFor(logging.WARNING)
    assert cpu.isEnabledFor(logging.ERROR)


def test_a_parser_has_the_name_under_which_it_was_called() -> None:
    with called_as("lora-adapters x"):
        assert Parser(prog="x.py").prog == "lora-adapters x"
    assert Parser(prog="x.py").prog == "x.py"


@pytest.mark.parametrize("command", cli.PROGRAMS)
def test_every_command_names_itself_and_refuses_wrong_usage(capsys, command) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lora-adapters {command} ")
    assert cli.main([command, "--no_such_option"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_the_reason_is_left_for_a_launcher(tmp_path, monkeypatch, capsys) -> None:
    """torchrun, and `accelerate launch` for several processes, show what is in this file last."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert run(raising(AdapterError("no LoRA")), []) == 1
    assert json.loads(file.read_text())["message"]["message"] == "error: no LoRA"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    assert run(raising(AdapterError("no LoRA")), []) == 1
    assert capsys.readouterr().err == "error: no LoRA\n" * 2


@pytest.mark.parametrize(("options", "notices"), [([], 1), (["--quiet"], 0)])
def test_accelerates_traceback_is_announced(tmp_path, options, notices) -> None:
    """`accelerate launch` for one process prints a traceback behind the reason, and cannot be kept from it."""
    script = tmp_path / "program.py"
    script.write_text("import sys\nfrom lora_adapters.cli import main\nsys.exit(main(['info', *sys.argv[1:]]))\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(
        [*launch, str(script), "nowhere.safetensors", "--quiet"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    _, reason, rest = done.stderr.partition("error: nowhere.safetensors")
    assert reason
    assert rest.count(NOTICE) == notices
    assert rest.count("CalledProcessError: ") == notices
    assert rest.find(NOTICE) <= rest.find("Traceback")


def test_an_empty_list_of_modules_is_no_warning(caplog) -> None:
    run(lambda argv: None, [])
    log = logging.getLogger("diffusers.models.modeling_utils")
    monkeypatched, log.propagate = log.propagate, True
    try:
        for kept in ("[]", "['norm']"):
            log.warning("There are modules in AutoencoderKL that should be kept in float32: %s. Casting ...", kept)
    finally:
        log.propagate = monkeypatched
    assert ["norm" in one.getMessage() for one in caplog.records] == [True]
