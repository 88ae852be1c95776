"""The documentation's build: `sphinx-build -W -b html docs site`.

Sphinx imports the package where mkdocs' tools only read it, so it finds convert/ and train/ as Python does.
"""

import dataclasses
import inspect
import re
from typing import Any

from peft import LoraConfig

import lora_adapters

project = "lora-adapters"
release = lora_adapters.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "pages/index"
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"lora-adapters {release}"
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True

_SPECIAL = re.compile(r"([\\*|_])")


def _text(paragraph: str) -> str:
    """A paragraph of a docstring as reStructuredText: code in single backticks, everything else taken literally."""
    parts = paragraph.split("`")
    plain = [_SPECIAL.sub(r"\\\1", part) for part in parts[::2]]
    code = [rf"\ ``{part}``\ " for part in parts[1::2]]
    return "".join(piece for pair in zip(plain, [*code, ""], strict=True) for piece in pair)


def _signature(app: Any, what: str, name: str, thing: Any, options: Any, given: str | None, result: str | None) -> Any:
    """PEFT's configs have three dozen fields of LoraConfig before their own: those are named, not listed."""
    if what == "class" and issubclass(thing, LoraConfig):
        return "(**fields: fields of peft.LoraConfig, and those below)", result
    return (given or "").replace("~collections.abc.", "").replace("~lora_adapters.convert.", "") or given, result


def _docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings here are plain sentences; fields of the configs explain themselves in their metadata."""
    paragraphs = "\n".join(lines).split("\n\n")
    lines[:] = "\n\n".join(part if part.lstrip().startswith(">>>") else _text(part) for part in paragraphs).split("\n")
    if what == "class" and dataclasses.is_dataclass(thing):
        # The fields that all adapter types have are shown where they are new: with the first type.
        shown = [thing, *(base for base in thing.__bases__ if base.__name__ == "AdapterConfig")]
        own = {name for cls in shown for name in inspect.get_annotations(cls)}
        for field in dataclasses.fields(thing):
            if "help" in field.metadata and field.name in own:
                default = "" if field.default is dataclasses.MISSING else f" Default: {field.default!r}."
                lines += ["", f":param {field.name}: {_text(field.metadata['help'] + default)}"]


def setup(app: Any) -> None:
    """Register the reading of docstrings."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon reads Args, Returns, Raises
    app.connect("autodoc-process-signature", _signature)
