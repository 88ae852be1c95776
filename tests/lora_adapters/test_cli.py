import subprocess
import sys

import pytest

from lora_adapters import __version__, cli


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in cli.PROGRAMS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lora-adapters {__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"), [("exract", "did you mean 'extract'?"), ("xyz", "the commands are merge, svd-merge, extract")]
)
def test_an_unknown_command_is_wrong_usage(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: unknown command '{word}': {hint}")
    assert printed.err.count("\n") == 1


def test_python_m(tmp_path) -> None:
    command = [sys.executable, "-m", "lora_adapters", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"lora-adapters {__version__}\n"), done.stderr
