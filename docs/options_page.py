"""Writes pages/options.md from the dataclasses that declare the options: `python docs/options_page.py`.

The last column, the tests that show what an option does, is the only one that is written by hand: it is kept.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_adapters.kohya_options import NETWORK_ARGS
from lora_adapters.train.data.config import DatasetConfig, SubsetConfig
from lora_adapters.train.data.schema import rules
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.options.option import Option, groups, options_of
from lora_adapters.train.options.settings import Settings

PAGE = Path(__file__).parent / "pages" / "options.md"
_HEAD = """\
# Options

<!-- Written by docs/options_page.py from the options' declarations, but for the tests' column: add tests there. -->

The options of `lora-adapters train` and `lora-adapters generate`, which have kohya's names and defaults; `--help` shows
the same in groups. An option may be abbreviated to a prefix that no other option has. Tests are paths under `tests/`;
that of the defaults is `train/options/test_arguments.py::test_defaults_are_those_that_users_know`. An option that is
not supported stops at once, with a line that says why.
"""
_TRAINING = """\
## `lora-adapters train`

"Dataset file" names the tables of `--dataset_config` that may contain an option: G is `[general]`, D `[[datasets]]`, S
`[[datasets.subsets]]`. "Metadata" is the entry in the saved file.
"""
_LINK = re.compile(r"^\| `([^`]+)` \|.*\| ([^|]*) \|$", re.MULTILINE)


def kept_tests(text: str) -> dict[str, str]:
    """Option -> its cell of tests, from the tables of a page."""
    return {name: cell.strip() for name, cell in _LINK.findall(text) if "::" in cell}


def render(tests: Mapping[str, str]) -> str:
    """The page, with these cells of tests."""
    parts = [_HEAD, _TRAINING]
    for title, names in groups(Settings).items():
        parts += [f"### {title.capitalize()}\n", _training_table([options_of(Settings)[name] for name in names], tests)]
    tables = rules(SubsetConfig) | rules(DatasetConfig)
    known = {option.toml_name or name for name, option in options_of(Settings).items()} | set(options_of(Settings))
    file_only = [option for name, option in tables.items() if name not in known]
    renamed = [option for name, option in tables.items() if name in known - set(options_of(Settings))]
    parts += ["### In dataset files only\n", _training_table([*renamed, *file_only], tests)]
    args = [[f"`{name}`", arg.takes, tests.get(name, "")] for name, arg in NETWORK_ARGS.items()]
    parts += ["### `--network_args`\n", _table(["option", "takes", "tests"], args), "## `lora-adapters generate`\n"]
    for title, names in groups(GenerateSettings).items():
        parts.append(f"### Generation: {title}\n")
        own = [options_of(GenerateSettings)[name] for name in names]
        parts.append(_table(["option", "default", "values", "meaning"], [_cells(option) for option in own]))
    return "\n".join(parts)


def _training_table(options: Iterable[Option], tests: Mapping[str, str]) -> str:
    rows = []
    for option in options:
        tables = f"{option.scope} as `{option.toml_name}`" if option.toml_name else option.scope
        entry = f"`{option.metadata}`" if option.metadata else ""
        rows.append([*_cells(option), tables, entry, tests.get(option.name, "")])
    return _table(["option", "default", "values", "meaning", "dataset file", "metadata", "tests"], rows)


def _cells(option: Option) -> list[str]:
    """Name, default, values, meaning."""
    values = ", ".join(map(str, option.choices)) if option.choices else option.limits
    meaning = f"{option.help} ({option.unsupported})".strip() if option.unsupported else option.help
    default = option.shown_default
    if not option.is_flag and option.default not in (None, ""):
        default = f"`{default}`"
    return [f"`{option.flag.removeprefix('--')}`", default, values, meaning]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    """A cell with what Markdown would take for markup outside of code written out."""
    parts = cell.split("`")
    parts[::2] = [re.sub(r"([|<>*\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def main() -> None:
    """Write the page anew."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(render(kept_tests(text)), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
