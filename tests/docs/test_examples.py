"""The examples with `>>>` in pages and docstrings give what they say."""

import doctest

import pytest

import lora_adapters
from lora_adapters import convert

from .blocks import PAGES, REPOSITORY, blocks

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (lora_adapters, convert)
    for name in module.__all__
    if name != "__version__"
}


def with_examples():
    pages = sorted([*PAGES.glob("*.md"), REPOSITORY / "CONTRIBUTING.md"])
    return [page for page in pages if any(block.language == "pycon" for block in blocks(page))]


def run(example):
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    said = []
    runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


@pytest.mark.parametrize("page", with_examples(), ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts, at = [], 0
    for block in blocks(page):
        if block.language == "pycon":
            parts.append("\n" * (block.line - 1 - at) + block.text)
            at = block.line - 1 + block.text.count("\n")
    run(doctest.DocTestParser().get_doctest("".join(parts), {}, page.name, str(page), 0))


def examples_in(thing):
    finder = doctest.DocTestFinder(exclude_empty=True)
    bases = [base for base in getattr(thing, "__mro__", ())[1:] if base.__module__.startswith("lora_adapters.convert")]
    return [test for part in (thing, *bases) for test in finder.find(part) if test.examples]


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if examples_in(thing)])
def test_docstring(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in examples_in(PUBLIC[name]):
        run(example)
