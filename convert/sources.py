"""Where an adapter is: a file, a folder, or a repository on the Hub."""

import re
from pathlib import Path
from typing import Any

from . import format_peft
from .errors import AdapterError, UnknownFormatError

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for by itself
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def _choose(names: list[str], place: str) -> str:
    """The one weights file among the names, or the one that diffusers would take."""
    names = [name for name in names if name.endswith(".safetensors")] or [
        name for name in names if name.endswith(_ENDINGS)
    ]
    if len(names) == 1:
        return names[0]
    if DIFFUSERS_NAME in names:
        return DIFFUSERS_NAME
    if not names:
        raise AdapterError(f"{place} holds no adapter (no {', '.join(_ENDINGS)} file and no {format_peft.CONFIG})")
    raise UnknownFormatError(f"{place} holds several files, name one with weight_name=: {', '.join(sorted(names)[:6])}")


def locate(source: str | Path, weight_name: str | None = None, subfolder: str | None = None, **hub: Any) -> Path:
    """The local path of an adapter's file or PEFT folder; a repository is downloaded to the Hub's cache.

    `hub` goes to `huggingface_hub.hf_hub_download` (token, revision, cache_dir, local_files_only, ...), whose own
    errors come through. AdapterError where there is nothing, or more than one file to choose from.
    """
    path = Path(source).expanduser()
    if path.exists():
        path = path / (subfolder or "")
        if not path.is_dir():
            return path
        if weight_name is None and format_peft.is_mine(path):
            return path
        if weight_name is not None and not (path / weight_name).exists():
            raise AdapterError(f"{path} has no file {weight_name}")
        return path / (weight_name or _choose([entry.name for entry in path.iterdir() if entry.is_file()], str(path)))
    if not _REPO_ID.fullmatch(str(source)) or str(source).endswith(_ENDINGS):
        raise AdapterError(f"{source} does not exist (no such file or folder, and no owner/name of a repository)")
    return _download(str(source), weight_name, subfolder, **hub)


def _download(repo: str, weight_name: str | None, subfolder: str | None, **hub: Any) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    options = {key: value for key, value in hub.items() if value is not None}
    if weight_name is None:
        try:
            return Path(hf_hub_download(repo, DIFFUSERS_NAME, subfolder=subfolder, **options))
        except EntryNotFoundError:
            pass
        start = f"{subfolder}/" if subfolder else ""
        about = {key: options[key] for key in ("token", "revision") if key in options}
        files = HfApi().list_repo_files(repo, **about)
        names = [name.removeprefix(start) for name in files if name.startswith(start)]
        if any(name.split("/")[-1] == format_peft.CONFIG for name in names):
            patterns = [f"{start}*{format_peft.CONFIG}", f"{start}*{format_peft.WEIGHTS}"]
            return Path(snapshot_download(repo, allow_patterns=patterns, **options)) / start
        weight_name = _choose([name for name in names if "/" not in name], repo)
    return Path(hf_hub_download(repo, weight_name, subfolder=subfolder, **options))
