"""The folders that the studio may read and write: a name that leads out of them, by `..` or by a link, is refused."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_adapters.convert.errors import OneLineError
from lora_adapters.convert.portable import file_name
from lora_adapters.train.data.image_suffixes import TRAINED

ADAPTER_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_PEFT_CONFIG, _MODEL_INDEX = "adapter_config.json", "model_index.json"
_DEEPEST = 4  # levels of folders that are looked through
_MOST = 2000  # entries that are listed


class StudioError(OneLineError):
    """Something that the studio cannot do, in one line for its page."""


@dataclass(frozen=True)
class Folders:
    """What the studio was started with.

    adapters, images: folders that are read; captions are written beside the images. output: the folder of all that
    is made, whose adapters are listed too. model: a file, a folder, or a repository on the Hub.
    """

    model: str
    output: Path
    adapters: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()

    @property
    def private(self) -> Path:
        """The folder of logs and of what is shown on the page, in the output folder."""
        return self.output / ".studio"

    def base_model(self, path: str) -> Path:
        """A model in the folders. StudioError if it is below none of them, or does not exist."""
        return _existing(_below(path, (*self.adapters, self.output)))

    def adapter(self, source: str) -> str:
        """An adapter of the listed folders as a path, or owner/name of a repository on the Hub as it is."""
        from lora_adapters.convert.storage.sources import is_repo_id  # imports torch

        if is_repo_id(source) and not Path(source).exists():  # a local folder of that name would be read instead
            return source
        return str(_existing(_below(source, (*self.adapters, self.output))))

    def image_folder(self, folder: str | Path) -> Path:
        """A folder of training images."""
        path = _existing(_below(folder, self.images))
        if not path.is_dir():
            raise StudioError(f"{folder} is not a folder")
        return path

    def new(self, name: str, ending: str = "", folder: str = "") -> Path:
        """A path to write, in the output folder. StudioError for a name that is none, or is taken already."""
        name = name.strip().removesuffix(ending)
        if not name or name != file_name(name) or name.startswith((".", "-")):
            raise StudioError(f"{name!r:.80} is not a file name: give letters, digits, dots and dashes")
        path = _below(self.output / folder / f"{name}{ending}", (self.output,))
        if path.exists():
            raise StudioError(f"{path.relative_to(self.output.resolve())} exists already: choose another name")
        return path

    def adapter_files(self) -> list[str]:
        """All adapters in the folders: weights files and PEFT folders, by path."""
        return [str(path) for path in _walk((*self.adapters, self.output), _is_adapter)]

    def model_files(self) -> list[str]:
        """All that may be a model: Diffusers folders and weights files."""
        roots = (*self.adapters, self.output)
        return [str(path) for path in _walk(roots, lambda path: _is_model(path) or _is_weights(path))]

    def image_folders(self) -> list[str]:
        """The folders with training images in them."""
        return [str(path) for path in _walk(self.images, _has_images, roots_too=True)]

    def shown(self, path: str | Path) -> str:
        """A path as it is listed: relative to the folder that it is in."""
        for root in (*self.adapters, self.output, *self.images):
            with contextlib.suppress(ValueError):
                relative = Path(path).relative_to(root)
                return root.name if relative == Path() else str(relative)
        return str(path)


def _below(path: str | Path, roots: Sequence[Path]) -> Path:
    try:
        resolved = Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL in a name, a circle of links
        raise StudioError(f"{str(path)!r:.120} is not a path") from None
    if not any(resolved.is_relative_to(root.resolve()) for root in roots):
        where = ", ".join(map(str, roots)) or "none was named"
        raise StudioError(f"{path!s:.200} is outside of the folders that the studio was started with ({where})")
    return resolved


def _existing(path: Path) -> Path:
    if not path.exists():
        raise StudioError(f"{path} does not exist")
    return path


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in ADAPTER_ENDINGS and path.is_file()


def _is_adapter(path: Path) -> bool:
    return _is_weights(path) or (path / _PEFT_CONFIG).is_file()


def _is_model(path: Path) -> bool:
    return (path / _MODEL_INDEX).is_file()


def _has_images(path: Path) -> bool:
    return path.is_dir() and any(entry.suffix.lower() in TRAINED for entry in path.iterdir())


def _walk(roots: Iterable[Path], matches: Callable[[Path], bool], roots_too: bool = False) -> list[Path]:
    """What is wanted below the roots, by name.

    Hidden entries, links that lead out, saved states and what models and PEFT adapters consist of are left alone.
    """
    paths: dict[Path, Path] = {}
    for root in roots:
        if roots_too and root.is_dir() and matches(root):
            paths.setdefault(root.resolve(), root)
        level = [root]
        for _ in range(_DEEPEST):
            deeper: list[Path] = []
            for path in (entry for folder in level for entry in _entries(folder)):
                if len(paths) >= _MOST or not path.resolve().is_relative_to(root.resolve()):
                    continue
                if matches(path):
                    paths.setdefault(path.resolve(), path)
                if path.is_dir() and not _is_adapter(path) and not _is_model(path):
                    deeper.append(path)
            level = deeper
    return sorted(paths.values())


def _entries(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # a folder that may not be read
        return []
    return [path for path in entries if not path.name.startswith(".") and not path.name.endswith("-state")]
