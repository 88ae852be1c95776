"""Emoji as captioned training pictures, drawn from the Noto Color Emoji font (SIL Open Font License 1.1)."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji
GLYPH_SIZE = (136, 128)  # the one bitmap size in the font, drawn at 109 points
BLOCKS = (range(0x203C, 0x3300), range(0x1F300, 0x1FB00))
# Signs that are a letter, a button or a hand of a clock: hundreds of near-equal pictures with names nobody types.
SIGNS = ("SQUARED", "CLOCK FACE", "ARROW", "KEYCAP", "MODIFIER", "INPUT SYMBOL", "CIRCLED", "TRIANGLE", "BUTTON")


@dataclass(frozen=True)
class Emoji:
    """One emoji: its character and its Unicode name in lower case, such as "closed umbrella"."""

    character: str
    name: str

    @property
    def caption(self) -> str:
        """The name with an article, as people write prompts: "an open book", "a red apple"."""
        if self.name.endswith("s") or " with " in self.name or " of " in self.name:
            return self.name
        return f"{'an' if self.name[0] in 'aeio' else 'a'} {self.name}"


def load_font(path: Path = FONT) -> ImageFont.FreeTypeFont:
    """The font at its bitmap size; FileNotFoundError names the Debian package where it is missing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: install Debian's fonts-noto-color-emoji, or give --font")
    return ImageFont.truetype(str(path), 109, layout_engine=ImageFont.Layout.BASIC)


def all_emoji(font: ImageFont.FreeTypeFont) -> list[Emoji]:
    """Every single-character pictograph that the font draws and Unicode names, in code point order."""
    found = []
    for character in (chr(code) for block in BLOCKS for code in block):
        name = unicodedata.name(character, "")
        drawn = font.getbbox(character)[1] == 0  # a missing glyph has an empty box at the base line
        if name and drawn and not any(sign in name for sign in SIGNS):
            found.append(Emoji(character, name.lower()))
    return found


def draw(emoji: Emoji, font: ImageFont.FreeTypeFont, size: int = 64) -> Image.Image:
    """The emoji on white, centred in a square RGB picture of `size` pixels."""
    glyph = Image.new("RGB", GLYPH_SIZE, "white")
    ImageDraw.Draw(glyph).text((0, 0), emoji.character, font=font, embedded_color=True)
    square = Image.new("RGB", (GLYPH_SIZE[0], GLYPH_SIZE[0]), "white")
    square.paste(glyph, (0, (GLYPH_SIZE[0] - GLYPH_SIZE[1]) // 2))
    return square.resize((size, size), Image.Resampling.LANCZOS)
