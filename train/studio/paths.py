"""The folders that the studio may read and write. Paths that lead outside, by `..` or by a link, are refused."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_adapters.convert.errors import OneLineError
from lora_adapters.convert.portable import file_name
from lora_adapters.train.data.image_suffixes import TRAINED

ADAPTER_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_PEFT_CONFIG, _MODEL_INDEX = "adapter_config.json", "model_index.json"
_DEEPEST = 4  # maximum depth of the search for files
_MOST = 2000  # maximum number of listed entries


class StudioError(OneLineError):
    """An error that is shown on the page, as one line."""


@dataclass(frozen=True)
class Folders:
    """The model and folders that the studio was started with.

    adapters, images: folders to read from; captions are written next to the images. output: the folder for all new
    files, whose adapters are listed too. model: a file, a folder, or a repository on the Hub.
    """

    model: str
    output: Path
    adapters: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()

    @property
    def private(self) -> Path:
        """The folder for logs and temporary files of the page, in the output folder."""
        return self.output / ".studio"

    def base_model(self, path: str) -> Path:
        """The path of a model in the folders. StudioError if it is outside of them or does not exist."""
        return _existing(_below(path, (*self.adapters, self.output)))

    def adapter(self, source: str) -> str:
        """The path of an adapter in the folders; owner/name of a Hub repository is returned unchanged."""
        from lora_adapters.convert.storage.sources import is_repo_id  # imports torch

        if is_repo_id(source) and not Path(source).exists():  # a local folder of this name would be read instead
            return source
        return str(_existing(_below(source, (*self.adapters, self.output))))

    def image_folder(self, folder: str | Path) -> Path:
        """A folder of training images."""
        path = _existing(_below(folder, self.images))
        if not path.is_dir():
            raise StudioError(f"{folder} is not a folder")
        return path

    def new(self, name: str, ending: str = "", folder: str = "") -> Path:
        """A new path in the output folder. StudioError if the name is not a valid file name or already exists."""
        name = name.strip().removesuffix(ending)
        if not name or name != file_name(name) or name.startswith((".", "-")):
            raise StudioError(f"{name!r:.80} is not a file name: give letters, digits, dots and dashes")
        path = _below(self.output / folder / f"{name}{ending}", (self.output,))
        if path.exists():
            raise StudioError(f"{path.relative_to(self.output.resolve())} exists already: choose another name")
        return path

    def adapter_files(self) -> list[str]:
        """All adapters in the folders (weight files and PEFT folders), sorted by path."""
        return [str(path) for path in _walk((*self.adapters, self.output), _is_adapter)]

    def model_files(self) -> list[str]:
        """All possible models in the folders: Diffusers folders and weight files."""
        roots = (*self.adapters, self.output)
        return [str(path) for path in _walk(roots, lambda path: _is_model(path) or _is_weights(path))]

    def image_folders(self) -> list[str]:
        """All folders that contain training images."""
        return [str(path) for path in _walk(self.images, _has_images, roots_too=True)]

    def shown(self, path: str | Path) -> str:
        """A path as shown in lists: relative to the studio's folder that contains it."""
        for root in (*self.adapters, self.output, *self.images):
            with contextlib.suppress(ValueError):
                relative = Path(path).relative_to(root)
                return root.name if relative == Path() else str(relative)
        return str(path)


def _below(path: str | Path, roots: Sequence[Path]) -> Path:
    try:
        resolved = Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL character, or circular links
        raise StudioError(f"{str(path)!r:.120} is not a path") from None
    if not any(resolved.is_relative_to(root.resolve()) for root in roots):
        where = ", ".join(map(str, roots)) or "none was given"
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
    """All matching paths below the roots, sorted.

    Skipped are hidden entries, links to the outside, saved states, and the content of model and PEFT folders.
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
    except OSError:  # an unreadable folder
        return []
    return [path for path in entries if not path.name.startswith(".") and not path.name.endswith("-state")]
