"""Emoji as captioned training images, drawn from the Noto Color Emoji font (SIL Open Font License 1.1)."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji
GLYPH_SIZE = (136, 128)  # the one bitmap size in the font, drawn at 109 points
BLOCKS = (range(0x203C, 0x3300), range(0x1F300, 0x1FB00))
# Signs that are a letter, a button or a hand of a clock: hundreds of near-equal images with names nobody types.
SIGNS = ("SQUARED", "CLOCK FACE", "ARROW", "KEYCAP", "MODIFIER", "INPUT SYMBOL", "CIRCLED", "TRIANGLE", "BUTTON")
# Animals, plants, food, buildings, vehicles, instruments, things of play: what people ask a small model for first.
THINGS = (
    range(0x1F308, 0x1F309), range(0x1F32D, 0x1F394), range(0x1F3A0, 0x1F3C0), range(0x1F3E0, 0x1F3F1),
    range(0x1F400, 0x1F440), range(0x1F451, 0x1F453), range(0x1F47B, 0x1F481), range(0x1F48D, 0x1F48F),
    range(0x1F680, 0x1F6A6), range(0x1F6B2, 0x1F6B3), range(0x1F916, 0x1F917), range(0x1F950, 0x1F970),
    range(0x1F980, 0x1F9AF), range(0x1F9C0, 0x1F9CC), range(0x26C4, 0x26C5), range(0x2693, 0x2694),
    range(0x26F5, 0x26F6), range(0x2615, 0x2616), range(0x26BD, 0x26BF), range(0x2602, 0x2604),
    range(0x1F302, 0x1F303), range(0x1F511, 0x1F512), range(0x1F514, 0x1F515), range(0x1FAD0, 0x1FAD7),
)  # fmt: skip


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

    @property
    def is_thing(self) -> bool:
        """Whether it stands in THINGS."""
        return any(ord(self.character) in block for block in THINGS)


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
    """The emoji on white, centred in a square RGB image of `size` pixels."""
    glyph = Image.new("RGB", GLYPH_SIZE, "white")
    ImageDraw.Draw(glyph).text((0, 0), emoji.character, font=font, embedded_color=True)
    square = Image.new("RGB", (GLYPH_SIZE[0], GLYPH_SIZE[0]), "white")
    square.paste(glyph, (0, (GLYPH_SIZE[0] - GLYPH_SIZE[1]) // 2))
    return square.resize((size, size), Image.Resampling.LANCZOS)
