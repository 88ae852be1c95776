"""Parsing adapters on a command line: a path followed by a weight, or A1111's `<lora:...>`.

a.safetensors          a.safetensors:0.8          a.safetensors:0.8:lbw=MIDD
<lora:a:0.8>           <lora:a:0.8:0.5>           <lora:a:te=0.8:unet=0.5:lbw=1,0,0,...>
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.registry import role_of
from lora_adapters.convert.parsing import number

from .block_weights import BlockWeights, parse, weighted

AnAdapter = TypeVar("AnAdapter", bound=Adapter)
_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")
_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_PRESET = re.compile(r"[A-Z][A-Z0-9.]*")
_OF_STEPS = ("start", "stop", "step")


@dataclass(frozen=True)
class ModelArgument:
    """One adapter of a command line.

    Args:
        source: File, folder or Hub repository.
        text: The weight of the text encoders; None if it is not given.
        unet: The weight of the U-Net or transformer; None if it is not given.
        blocks: Block weights; None if they are not given.
    """

    source: str
    text: float | None = None
    unet: float | None = None
    blocks: BlockWeights | None = None

    def applied(self, adapter: AnAdapter) -> tuple[AnAdapter, float]:
        """The adapter with its block weights applied, and the weight that remains to be applied (1 by default)."""
        if self.blocks is not None:
            adapter = weighted(adapter, self.blocks)
        if self.text == self.unet:
            return adapter, 1.0 if self.text is None else self.text
        text, unet = self.text or 0.0, self.unet or 0.0
        pairs = {
            module: change.scaled(unet if role_of(module.component) == "denoiser" else text)
            for module, change in adapter.modules.items()
        }
        return adapter.with_modules(pairs), 1.0


def read_arguments(texts: Sequence[str]) -> list[ModelArgument]:
    """Read the adapters of a command line.

    Args:
        texts: Paths followed by weights, or A1111's tags; one argument may contain several tags.

    Returns:
        One entry for each adapter, in order.

    Raises:
        AdapterError: An argument cannot be parsed; the message contains it.
    """
    arguments = []
    for text in texts:
        tags = _TAG.findall(text)
        if not tags:
            arguments.append(_of_path(text))
            continue
        between = _TAG.sub("", text).strip()
        if between:
            raise AdapterError(f"{text:.120}: unexpected {between[:60]!r} beside <lora:...>; give only the adapters")
        arguments += [_of_tag(tag) for tag in tags]
    return arguments


def _of_path(text: str) -> ModelArgument:
    """Parse a path followed by weights; colons can also be part of the path (`C:\\a.safetensors`, a file's name)."""
    if ":" not in text or Path(text).expanduser().exists():
        return ModelArgument(text)
    drive = text[:2] if re.match(r"[A-Za-z]:[\\/]", text) else ""
    source, *items = text.removeprefix(drive).split(":")
    while items and not _is_item(items[0]):  # still part of the path
        source = f"{source}:{items.pop(0)}"
    return _argument(text, drive + source, items)


def _is_item(text: str) -> bool:
    return "=" in text or _is_number(text) or _PRESET.fullmatch(text) is not None


def _of_tag(inner: str) -> ModelArgument:
    drive = inner[:2] if re.match(r"[A-Za-z]:[\\/]", inner) else ""
    name, *items = inner.removeprefix(drive).split(":")
    name = drive + name.strip().strip('"')
    if not name:
        raise AdapterError(f"<lora:{inner:.80}> has no adapter name")
    return _argument(f"<lora:{inner}>", _with_ending(name), items)


def _with_ending(name: str) -> str:
    """The file for a name without its extension, as in A1111's tags; the name itself if no such file exists."""
    there = [name + ending for ending in ("", *_ENDINGS) if Path(name + ending).expanduser().exists()]
    return there[0] if there else name


def _argument(whole: str, source: str, items: list[str]) -> ModelArgument:
    weights: list[float] = []
    options: dict[str, str] = {}
    for item in map(str.strip, items):
        key, equals, value = item.partition("=")
        if equals:
            options[key] = value.strip()
        elif _is_number(item) and len(weights) < 2:
            weights.append(number(item))
        elif "lbw" not in options:  # the extension's older form: <lora:a:0.8:MIDD>
            options["lbw"] = item
        else:
            raise AdapterError(f"{whole:.120}: {item[:60]!r} cannot be parsed: write {source}:weight:lbw=weights")
    for key in options:
        if key in _OF_STEPS:
            raise AdapterError(f"{whole:.120}: {key}= depends on sampling steps, which is not supported: leave it out")
        if key not in ("te", "unet", "lbw"):
            raise AdapterError(f"{whole:.120}: unknown option {key:.40}=: use te=, unet= or lbw=")
    try:
        text = number(options["te"]) if "te" in options else weights[0] if weights else None
        unet = number(options["unet"]) if "unet" in options else weights[1] if len(weights) > 1 else text
        blocks = parse(options["lbw"], rest=0.0) if "lbw" in options else None
    except (ValueError, AdapterError) as error:
        raise AdapterError(f"{whole:.120}: {error}") from None
    return ModelArgument(source, unet if text is None else text, unet, blocks)


def _is_number(text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True
