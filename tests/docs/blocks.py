"""The code blocks of the documentation's pages."""

import re
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PAGES = REPOSITORY / "docs" / "pages"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, the first line of the text, and its heading."""

    language: str
    text: str
    line: int
    heading: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks with a language in a Markdown page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        before = text[: match.start()]
        headings = re.findall(r"^#+ (.+)$", re.sub(_BLOCK, "", before), re.MULTILINE)
        line = before.count("\n") + 2
        found.append(Block(match[1], match[2], line, headings[-1] if headings else ""))
    return found
