"""The command on the page about training images runs, and its table names the options that there are."""

import re

from lora_adapters.train.resizing import options

from .blocks import PAGES, blocks
from .test_readme import clone, quickstart_file, run_shell  # noqa: F401  # fixtures

PAGE = PAGES / "training-images.md"


def test_the_command(clone):  # noqa: F811
    [block] = blocks(PAGE)
    said = run_shell(block.text)
    images = len([*(clone / "examples" / "images" / "delft" / "train").glob("*.png")])
    assert f"images: {images}, resized: {2 * images}, already there: 0" in said
    made = {file.name for file in (clone / "smaller").iterdir()}
    assert {"anchor.png", "anchor.txt", "anchor+48x48.jpg", "anchor+48x48.txt", "anchor+32x32.jpg"} <= made


def test_the_table_has_every_option():
    told = set(re.findall(r"^\| `(--\w+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    known = {flag for action in options.parser()._actions for flag in action.option_strings}
    known -= {"-h", "--help", "-q", "--quiet"}
    assert told == known
