"""The output of `lora-adapters init`: a description of the image folder, and the chosen settings."""

from collections import Counter
from collections.abc import Sequence

from lora_adapters.convert.tools.command_line import printable
from lora_adapters.train.data.image_suffixes import READ, TRAINED
from lora_adapters.train.preparing.choose import Plan
from lora_adapters.train.preparing.look import Folder, alike

_SHOWN = 5
_TO_CONVERT = (READ - TRAINED) | {".dng", ".cr2", ".cr3", ".nef", ".arw"}  # photos, but not readable for training


def seen(folder: Folder, side: int) -> list[str]:
    """Lines that describe a folder; `side` is the training resolution."""
    images, unreadable = folder.readable, folder.unreadable
    lines = [f"{folder.path}: {len(folder.images)} images"]
    if folder.repeats > 1:
        lines.append(f"  its name says {folder.repeats} repeats of {folder.class_tokens}")
    areas = sorted((image.size for image in images), key=lambda size: size[0] * size[1])
    shapes = Counter(_shape(*size) for size in areas)
    small, large = ("x".join(map(str, size)) for size in (areas[0], areas[-1]))
    lines.append(
        f"  sizes {small} to {large}: {', '.join(f'{count} {shape}' for shape, count in shapes.most_common())}"
    )
    turned = sum(image.turned for image in images)
    if turned:
        lines.append(f"  {turned} are turned by their EXIF data, as training turns them too")
    below = [image.path.name for image in images if image.size[0] * image.size[1] < side * side]
    if below:
        lines.append(f"  {len(below)} have fewer pixels than {side}x{side}, and less detail: {_names(below)}")
    if 4 * areas[len(areas) // 2][0] * areas[len(areas) // 2][1] < side * side:
        lines.append(f"  most have less than a quarter of that: find larger ones, or enlarge them to {side} pixels")
    if unreadable:
        reasons = [f"{image.path.name} ({image.wrong})" for image in unreadable]
        lines.append(f"  {len(unreadable)} cannot be read, and are left out in training: {_names(reasons)}")
    lines += [*_captions(folder), *_others(folder)]
    groups = [[image.path.name for image in group] for group in alike(images)]
    if groups:
        extra = sum(map(len, groups)) - len(groups)
        shown = "; ".join(" = ".join(group[:3]) for group in groups[:_SHOWN])
        lines.append(f"  {extra} look like another one, and count more than once: {shown}{_more(len(groups))}")
    return [printable(line) for line in lines]


def _captions(folder: Folder) -> list[str]:
    ending = folder.ending
    if ending is None:
        return ["  no captions (files such as cat.txt beside cat.jpg): all get the same, class_tokens"]
    without = [path.name for path in folder.uncaptioned(ending)]
    lines = [f"  {folder.endings[ending]} have a {ending} caption"]
    if without:
        lines.append(f"  {len(without)} have none, and get class_tokens: {_names(without)}")
    others = {other: count for other, count in folder.endings.items() if other != ending}
    if others:
        listed = ", ".join(f"{count} {other}" for other, count in others.items())
        lines.append(f"  captions of other endings are not read ({listed}): rename them to {ending}")
    empty = [name for name, text in folder.captions.items() if not text]
    if empty:
        lines.append(f"  {len(empty)} captions are empty: {_names(empty)}")
    if folder.wrong_captions:
        wrong = [f"{path.name} ({why})" for path, why in folder.wrong_captions]
        lines.append(f"  training will stop at captions that are not text, correct them: {_names(wrong)}")
    return lines


def _others(folder: Folder) -> list[str]:
    """Lines about files that training does not read."""
    if not folder.others:
        return []
    lines = [f"  {len(folder.others)} other files are not read: {_names([file.name for file in folder.others])}"]
    photos = [file.name for file in folder.others if file.suffix.lower() in _TO_CONVERT]
    if photos:
        lines.append(f"  photos that have to be saved as JPEG or PNG to be trained on: {_names(photos)}")
    return lines


def chosen(made: Plan) -> list[str]:
    """The chosen settings and their reasons, one line each."""
    subsets = [(key, choice) for subset in made.subsets for key, choice in subset.items() if key != "image_dir"]
    entries = [*made.dataset.items(), *dict(subsets).items(), *made.options.items()]
    return [printable(f"  {key} = {choice.value}: {choice.why} [{choice.source}]") for key, choice in entries]


def _shape(width: int, height: int) -> str:
    return "square" if width == height else "landscape" if width > height else "portrait"


def _names(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{_more(len(names))}"


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""
