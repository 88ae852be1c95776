"""Locating an adapter: a file, a folder, or a repository on the Hub."""

import filecmp
import re
from pathlib import Path
from typing import Any

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import COMPONENTS

from . import peft_folder
from .files import is_index, shards
from .hub_errors import HubError, hub_errors, incomplete_snapshot, is_missing_there

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for by default
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


class SeveralFilesError(AdapterError):
    """A folder or repository contains several adapters, so that a file name is needed."""


def is_repo_id(name: str) -> bool:
    """Whether a name looks like a repository (owner/name) and not like a weights file."""
    return _REPO_ID.fullmatch(name) is not None and not name.lower().endswith(_ENDINGS)


def _choose(names: list[str], place: str) -> str:
    """Choose the only weights file among the names, or the one that diffusers would choose."""
    index = next((name for name in sorted(names) if name.endswith(".index.json")), None)
    names = [name for name in names if name.lower().endswith(".safetensors")] or [
        name for name in names if name.lower().endswith(_ENDINGS)
    ]
    if len(names) == 1:
        return names[0]
    if DIFFUSERS_NAME in names:
        return DIFFUSERS_NAME
    if index is not None and len(names) > 1:
        return index
    if not names:
        raise AdapterError(f"{place} contains no adapter (no {', '.join(_ENDINGS)} file and no {peft_folder.CONFIG})")
    shown = [f"{name:.48}" for name in sorted(names)[:4]] + (["..."] if len(names) > 4 else [])
    raise SeveralFilesError(f"{place} has {len(names)} weights files, choose one with weight_name: {', '.join(shown)}")


def locate(source: str | Path, weight_name: str | None = None, subfolder: str | None = None, **hub: Any) -> Path:
    """Find the local path of an adapter; a repository is downloaded to the Hub's cache.

    Args:
        source: A file, a folder, or owner/name of a repository.
        weight_name: The file in the folder or repository. If None, it is the file with diffusers' default name, a PEFT
            folder, or the only weights file.
        subfolder: A subfolder of the folder or repository.
        **hub: Options of `huggingface_hub.hf_hub_download` (token, revision, cache_dir, local_files_only, endpoint,
            ...).

    Returns:
        The path of a file or a PEFT folder.

    Raises:
        AdapterError: The source does not exist, contains no adapter, or contains several.
        HubError: The repository cannot be downloaded: missing, private, gated, no such revision, offline. It is an
            AdapterError whose cause is the error of huggingface_hub.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _in_folder(path / (subfolder or ""), weight_name)
    if not is_repo_id(str(source)):
        raise AdapterError(f"{source} does not exist (it is not a file, a folder, or the owner/name of a repository)")
    return _in_repository(str(source), weight_name, subfolder, {key: hub[key] for key in hub if hub[key] is not None})


def _in_folder(path: Path, weight_name: str | None) -> Path:
    """Find the adapter in a folder: the file, or the folder itself if it is PEFT's without a file for diffusers."""
    if not path.is_dir():
        return path
    if weight_name is not None:
        if not (path / weight_name).exists():
            raise AdapterError(f"{path} has no file {weight_name}")
        return path / weight_name
    if (path / DIFFUSERS_NAME).is_file():
        return path / DIFFUSERS_NAME
    if peft_folder.is_peft_folder(path):
        return path
    files = [entry.name for entry in path.iterdir() if entry.is_file()]
    try:
        return path / _choose(files, str(path))
    except SeveralFilesError as error:
        weights = sorted(name for name in files if name.lower().endswith(_ENDINGS))
        if not all(filecmp.cmp(path / weights[0], path / name, shallow=False) for name in weights[1:]):
            raise error from None
        return path / weights[0]  # all files have the same contents


def _in_repository(repo: str, weight_name: str | None, subfolder: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(name: str) -> Path:
        shown = f"{subfolder}/{name}" if subfolder else name
        with hub_errors(repo, options.get("revision"), shown):
            return Path(hf_hub_download(repo, name, subfolder=subfolder, **options))

    if weight_name is not None:
        return download(weight_name)
    try:
        return download(DIFFUSERS_NAME)
    except HubError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):  # offline: try files in the cache
            return _cached(repo, subfolder, options, error)
        if not is_missing_there(error.__cause__):
            raise
    return _listed(repo, subfolder, options, download)


def _listed(repo: str, subfolder: str | None, options: dict[str, Any], download: Any) -> Path:
    """Download an adapter that does not have diffusers' default name: a PEFT folder or the only weights file."""
    from huggingface_hub import HfApi, snapshot_download

    start = f"{subfolder}/" if subfolder else ""
    revision = options.get("revision")
    with hub_errors(repo, revision):
        api = HfApi(endpoint=options.get("endpoint"), token=options.get("token"))
        files = set(api.list_repo_files(repo, revision=revision))
    if start and not any(name.startswith(start) for name in files):
        raise AdapterError(f"{repo} has no folder {subfolder}")
    places = [f"{start}{part}/" if part else start for part in ("", *COMPONENTS)]
    peft = [place for place in places if f"{place}{peft_folder.CONFIG}" in files]
    if peft:
        needed = (peft_folder.CONFIG, peft_folder.WEIGHTS, peft_folder.WEIGHTS_PICKLED)
        patterns = [f"{place}{name}" for place in peft for name in needed]
        with hub_errors(repo, revision):
            return Path(snapshot_download(repo, allow_patterns=patterns, **options)) / start
    names = [name.removeprefix(start) for name in files if name.startswith(start)]
    chosen = download(_choose([name for name in names if "/" not in name], f"{repo}/{start}" if start else repo))
    for shard in shards(chosen) if is_index(chosen) else ():
        download(shard.name)
    return chosen


def _cached(repo: str, subfolder: str | None, options: dict[str, Any], error: HubError) -> Path:
    """An adapter of the repository in the cache; if it is not there, the error of the failed download is raised."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    local = {key: options[key] for key in ("cache_dir", "revision") if key in options}
    try:
        folder = Path(snapshot_download(repo, local_files_only=True, **local))
    except LocalEntryNotFoundError as nothing:
        incomplete = incomplete_snapshot(nothing)  # only the adapter's files were downloaded
        if incomplete is None:
            raise error from error.__cause__
        folder = incomplete
    try:
        return _in_folder(folder / (subfolder or ""), None)
    except SeveralFilesError:
        raise
    except AdapterError:
        raise error from error.__cause__
