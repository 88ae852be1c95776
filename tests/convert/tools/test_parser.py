"""Help, defaults and suggestions of every program."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_adapters import cli
from lora_adapters.completion import whole_parser
from lora_adapters.convert.errors import UsageError
from lora_adapters.convert.tools.parser import Parser, refuse
from tests.convert.checkpoints import GOLDEN

HELP = GOLDEN / "help"


def shown(capsys, command: str, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", cli.PROGRAMS)
def test_help_is_as_it_was_read(capsys, monkeypatch, command) -> None:
    """A change is looked at: python -m tests.convert.tools.test_parser writes these files anew."""
    text = shown(capsys, command, monkeypatch)
    usage, empty, *_ = text.splitlines()
    assert usage.startswith(f"usage: lora-adapters {command} ")
    assert usage.endswith("[options]")
    assert empty == ""
    assert f"example:\n  lora-adapters {command} " in text
    assert ".py" not in usage
    assert _plain(text) == _plain((HELP / f"{command}.txt").read_text(encoding="utf-8"))


def test_help_needs_no_slow_library() -> None:
    """The help of every command and a wrong option are shown without what takes seconds to import."""
    program = f"""
import contextlib, io, sys
from lora_adapters import cli
for command in {list(cli.PROGRAMS)}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    slow = sorted({{"torch", "diffusers", "transformers", "peft", "accelerate", "gradio"}} & set(sys.modules))
    assert not slow, (command, slow)
with contextlib.redirect_stderr(io.StringIO()):
    assert cli.main(["merge", "--wrong"]) == 2
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _plain(text: str) -> str:
    """Words only: Python versions fill lines and write metavars of lists differently."""
    return " ".join(re.sub(r"optional arguments", "options", text).split())


@pytest.mark.parametrize("command", ["train", "generate", "resize-images"])
def test_every_option_says_its_default(capsys, monkeypatch, command) -> None:
    text = " ".join(shown(capsys, command, monkeypatch).split())
    options = text[text.index("--quiet print") :].partition("not supported (")[0]
    entries = re.findall(r"--\w+.*?(?=--\w+ |$)", options)
    assert options.count("(default: ") >= len(entries) / 2
    (commands,) = (one for one in whole_parser()._actions if isinstance(one, argparse._SubParsersAction))
    for action in commands.choices[command]._actions:
        if action.option_strings and action.help != argparse.SUPPRESS and action.dest not in ("help", "==SUPPRESS=="):
            assert "(default: " in (action.help or ""), action.dest


def test_refused_options_stand_last(capsys, monkeypatch) -> None:
    text = shown(capsys, "train", monkeypatch)
    before, refused = text.split("not supported (giving one prints the reason):")
    for name in ("--zero_stage", "--deepspeed"):
        assert name in refused
        assert name not in before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lenght", "3"], "unrecognized arguments: --lenght 3; did you mean --length?"),
        (["--kind", "bxg"], "; did you mean big?"),
        (["--kind", "zzz"], "(choose from"),
        (["--old", "1"], "--old is not supported: it is new"),
    ],
)
def test_what_may_have_been_meant(words, said) -> None:
    parser = Parser(prog="x.py")
    parser.add_argument("--length", type=int)
    parser.add_argument("--kind", choices=["big", "small"])
    refuse(parser, "--old", "it is new")
    with pytest.raises(UsageError) as raised:
        parser.parse_args(words)
    assert said in str(raised.value)
    assert ("did you mean" in str(raised.value)) == ("did you mean" in said)


def test_a_default_that_the_help_does_not_say_is_added() -> None:
    parser = Parser(prog="x.py", description="Does 100 % of it.", examples=["--a 1"])
    parser.add_argument("--a", default=3, help="an amount of 5 %%")
    parser.add_argument("--b", default=3, help="by default three")
    parser.add_argument("--c", required=True, metavar="C")
    parser.add_argument("--d", action="store_true", help="a switch")
    text = parser.format_help()
    assert text.startswith("usage: x.py --c C [options]\n\nDoes 100 % of it.\n\nexample:\n  x.py --a 1\n")
    assert "an amount of 5 % (default: 3)" in text
    assert "by default three\n" in text
    assert "a switch\n" in text


def write(folder: Path) -> None:
    """Write the help of all programs into a folder."""
    import contextlib
    import io
    import os

    os.environ["COLUMNS"] = "120"
    for command in cli.PROGRAMS:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        (folder / f"{command}.txt").write_text(said.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    write(HELP)
