"""The summary of a written adapter that programs print: file, size, ranks, trigger words, how to load it."""

from pathlib import Path

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.choices import OTHER
from lora_adapters.convert.deltas.low_rank import rank_range

_UNITS = ("bytes", "KiB", "MiB", "GiB")


def shown_size(count: float) -> str:
    """Format a number of bytes in a suitable unit.

    Args:
        count: The number of bytes.

    Returns:
        The number and the unit.

    >>> shown_size(300), shown_size(2 * 1024 * 1024)
    ('300 bytes', '2.0 MiB')
    """
    place = 0
    while count >= 1024 and place < len(_UNITS) - 1:
        count, place = count / 1024, place + 1
    return f"{count:.1f} {_UNITS[place]}" if place else f"{count:.0f} {_UNITS[0]}"


def written(path: Path, adapter: Adapter, trigger_words: str | None = None) -> str:
    """Describe an adapter that was written: file, size, kind, ranks, trigger words, how to load it.

    Args:
        path: The file, or the PEFT folder.
        adapter: The adapter in it.
        trigger_words: The trigger words of the training, used if the metadata contain none.

    Returns:
        A few lines.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    ranks = rank_range(change.rank for change in adapter.modules.values() if change.rank is not None)
    kind = f"DyLoRA of unit {adapter.dylora.unit}" if adapter.dylora else ", ".join(adapter.kinds)
    size = shown_size(sum(file.stat().st_size for file in files))
    words = adapter.metadata.get("modelspec.trigger_phrase") or trigger_words
    lines = [f"wrote {path}: {size}, {kind}, rank {ranks}, {len(adapter.modules)} modules of {_listed(adapter)}"]
    if words:
        lines.append(f"  trigger words: {words}")
    if adapter.modules and adapter.architecture == OTHER:
        return "\n".join([*lines, "  to load it: use a program that loads the adapters that it was made from"])
    if path.is_dir():
        lines.append(f'  to load it: Adapter.load("{path}"), or PeftModel.from_pretrained with a subfolder')
        return "\n".join(lines)
    lines.append(f'  to load it in diffusers: pipe.load_lora_weights("{path}")')
    if path.suffix == ".safetensors":
        lines.append(f"  in A1111: <lora:{path.stem}:1>, the file in models/Lora; in ComfyUI: models/loras, Load LoRA")
    return "\n".join(lines)


def _listed(adapter: Adapter) -> str:
    *others, last = adapter.components
    return f"{', '.join(others)} and {last}" if others else last
