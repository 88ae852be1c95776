"""Generation settings as text in image files, in the format of AUTOMATIC1111's web UI."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "parameters"  # key of the PNG text chunk
_EXIF, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
_LORA = re.compile(r"\s*<lora:[^:>]+(:[^>]*)?>")
_NEGATIVE = "Negative prompt: "


def parameters(
    prompt: str, negative_prompt: str, adapters: Iterable[tuple[str, float]], entries: Mapping[str, object]
) -> str:
    """Write the text: the prompt with `<lora:name:weight>` for each adapter, the negative prompt, a line of entries."""
    loras = "".join(f" <lora:{name}:{weight:g}>" for name, weight in adapters)
    lines = [prompt + loras, *([_NEGATIVE + negative_prompt] if negative_prompt else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(str(value))}" for key, value in entries.items())])


def _quoted(value: str) -> str:
    """Quote a value if it contains characters that would end it."""
    if not re.search(r"[,:\n]", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def prompts_in(text: str) -> tuple[str, str]:
    """(prompt without `<lora:...>`, negative prompt) from such a text."""
    *lines, last = text.strip().split("\n")
    if len(re.findall(r"\w[\w \-/]+: ?(?:\"(?:\\.|[^\\\"])+\"|[^,]*)", last)) < 3:
        lines.append(last)
    prompt, _, negative = "\n".join(lines).partition(f"\n{_NEGATIVE}")
    return _LORA.sub("", prompt).strip(), negative.strip()


def save_options(text: str, suffix: str) -> dict[str, Any]:
    """Arguments of Pillow's `save` to store the text: in a PNG text chunk, else in EXIF's UserComment."""
    if suffix == ".png":
        info = PngInfo()
        info.add_text(KEY, text)
        return {"format": "png", "pnginfo": info}
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_USER_COMMENT] = _UNICODE + text.encode("utf-16-be")
    return {"format": "webp" if suffix == ".webp" else "jpeg", "quality": 100, "exif": exif}


def read_text(file: Path) -> str | None:
    """Read the settings text of an image; None if there is none."""
    with Image.open(file) as image:
        text = image.info.get(KEY)
        if isinstance(text, str):
            return text
        comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT, b"")
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    return None


def short_hash(file: Path) -> str:
    """The first ten hex digits of a file's SHA-256, which identify a checkpoint in the web UI."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:10]
