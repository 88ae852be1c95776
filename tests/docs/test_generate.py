"""The page about drawing images: its commands and calls run, its tables name the options that there are."""

import re
import shlex

import pytest

from lora_adapters import cli
from lora_adapters.train.generation import options
from lora_adapters.train.generation.requests import OPTIONS

from .blocks import PAGES, blocks
from .test_readme import clone, quickstart_file  # noqa: F401  # fixtures

PAGE = PAGES / "generate.md"
TEXT = PAGE.read_text(encoding="utf-8")


COMMANDS = [block.text for block in blocks(PAGE) if block.language == "sh" and "lora-adapters" in block.text]
FILE = re.compile(r"cat > (\S+) <<'END'\n(.*?)^END\n", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_commands(clone, number, capsys):  # noqa: F811
    """Each command runs (here in this process, with fewer steps) and writes what it says."""
    text = re.sub(r"--steps \d+", "--steps 2", COMMANDS[number])
    for name, content in FILE.findall(text):
        (clone / name).write_text(content, encoding="utf-8")
    words = shlex.split(FILE.sub("", text).replace("\\\n", " "))
    assert words[0] == "lora-adapters"
    assert cli.main(words[1:]) == 0
    written = clone / capsys.readouterr().out.rsplit(": ", 1)[1].strip()
    assert written.exists()


def test_all_line_options_are_told():
    table = TEXT[TEXT.index("| in the line") : TEXT.index("Words can be weighted")]
    first = "".join(line.split(" | ")[0] for line in table.splitlines())
    assert set(re.findall(r"--(\w+)", first)) == set(OPTIONS)


def test_options_on_the_page_exist():
    made = options.parser()
    known = {flag for action in made._actions for flag in action.option_strings} | {f"--{name}" for name in OPTIONS}
    others = {"--nl", "--out"}  # one that is refused, and one of examples/three_loras.py
    assert {flag for flag in re.findall(r"--\w+", TEXT) if flag not in known} <= others
