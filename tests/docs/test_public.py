"""Every public name explains itself, and stands in the API reference."""

import inspect
import re

import pytest

from .blocks import PAGES
from .test_examples import PUBLIC

API = (PAGES / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PUBLIC)
def test_is_documented(name):
    thing = PUBLIC[name]
    members = {name: thing}
    if inspect.isclass(thing) and thing.__module__.startswith("lora_adapters"):
        own = {key: value for key, value in vars(thing).items() if not key.startswith("_")}
        members |= {f"{name}.{key}": value for key, value in own.items() if hasattr(value, "__doc__")}
    for at, member in members.items():
        member = member.__func__ if isinstance(member, classmethod) else member
        if inspect.isclass(thing) and not (callable(member) or isinstance(member, property)):
            continue  # a field: the class's text is about it
        text = inspect.getdoc(member) or ""
        assert len(text.split()) >= 3, f"{at} has no docstring"
        assert not text.startswith(f"{thing.__name__}("), f"{at} has only the signature that dataclasses make up"
    shown = re.findall(r"auto\w+:: lora_adapters\.(?:convert\.)?(\w+)", API)
    assert name.split(".")[-1] in shown
