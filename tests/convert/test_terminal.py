"""Messages, --quiet, and colours on terminals."""

import io

import pytest

from lora_adapters import cli
from lora_adapters.convert.progress import progress
from lora_adapters.convert.terminal import be_quiet, is_quiet, own_quiet, say, styled
from tests.convert.checkpoints import GOLDEN

FILE = str(GOLDEN / "sd15" / "lierla.safetensors")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quiet_ends_with_the_program(capsys) -> None:
    with own_quiet():
        be_quiet()
        assert is_quiet()
        say("nothing")
        assert list(progress([1], "counting")) == [1]
    assert not is_quiet()
    say("something")
    assert capsys.readouterr().out == "something\n"


def test_quiet_programs(capsys, tmp_path) -> None:
    words = ["resize", "--model", FILE, "--save_to", str(tmp_path / "x.safetensors"), "--new_rank", "1"]
    assert cli.main([*words, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(words) == 0
    assert "relative error: " in capsys.readouterr().out
    assert cli.main(["info", FILE, "--quiet"]) == 0
    assert "rank" in capsys.readouterr().out  # what it was asked for


def test_colour_is_for_terminals(monkeypatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styled("error:", "red", io.StringIO()) == "error:"
    assert styled("error:", "red", Terminal()) == "\x1b[31merror:\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("error:", "red", Terminal()) == "error:"
    monkeypatch.setenv("TERM", "dumb")
    assert styled("error:", "red", Terminal()) == "error:"
