"""Pushing adapters to the Hub: writes the repository's files and uploads them in one commit."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import COMPONENTS
from lora_adapters.convert.formats.peft import CONFIG, WEIGHTS
from lora_adapters.convert.storage.hub_errors import HubError, hub_errors, is_missing_there
from lora_adapters.convert.storage.sources import DIFFUSERS_NAME, is_repo_id

from .model_card import MARK, Sample, base_model_of, model_card

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from PIL.Image import Image

CARD, GRID = "README.md", "samples.png"
# Files of components in a repository: an earlier adapter may have had some that the new one does not have.
_OF_COMPONENTS = [f"{part}/{file}" for part in COMPONENTS for file in (CONFIG, WEIGHTS)]


def write_folder(
    adapter: Adapter,
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    trigger_words: Sequence[str] = (),
    description: str | None = None,
    license: str | None = None,
    samples: "Mapping[str, str | Path | Image] | None" = None,
    grid: "str | Path | Image | None" = None,
    tags: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    subfolder: str | None = None,
) -> Path:
    """Write the files of an adapter's repository.

    `pytorch_lora_weights.safetensors`, the file that diffusers looks for, is in kohya's format with the same alpha in
    all modules, which diffusers also reads correctly without this package. PEFT reads the folders of the components
    (`unet/`, `text_encoder/`, ...). README.md is the model card. An adapter that is not only low-rank pairs is written
    as one file in LyCORIS' format.

    Args:
        adapter: The adapter.
        folder: The folder to write.
        repo_id: The repository, owner/name, for the card.
        base_model: The base model's repository; None uses the one in the metadata, or else the family's first one.
        trigger_words: Words that activate the adapter in a prompt.
        description: Text for the card, in Markdown.
        license: The license's identifier on the Hub.
        samples: Sample images (PIL images or files) by prompt, for the card's gallery.
        grid: One image that contains several samples.
        tags: Additional tags for the card.
        dtype: The dtype of the weights; None keeps each tensor's own.
        subfolder: The adapter's folder in the repository, for the card's example.

    Returns:
        The folder.

    Raises:
        AdapterError: Something cannot be read or written.
    """
    folder = Path(folder).expanduser()
    base_model = base_model or base_model_of(adapter)
    _write_weights(adapter, folder, base_model, dtype)
    shown = _write_images(samples or {}, grid, folder)
    card = model_card(
        adapter,
        repo_id,
        base_model=base_model,
        trigger_words=trigger_words,
        description=description,
        license=license,
        samples=shown,
        grid=GRID if grid is not None else None,
        tags=tags,
        subfolder=subfolder,
    )
    (folder / CARD).write_text(str(card), encoding="utf-8")
    return folder


def _write_weights(adapter: Adapter, folder: Path, base_model: str, dtype: torch.dtype | None) -> None:
    """Write the file for diffusers, and the folders for PEFT if it can hold the adapter."""
    adapter.save(folder / DIFFUSERS_NAME, fold_alpha=adapter.has_only_pairs, dtype=dtype)
    if adapter.has_only_pairs:
        adapter.save(folder, "peft", dtype=dtype)
        for component in adapter.components:
            _name_base_model(folder / component / CONFIG, base_model)


def _write_images(
    samples: "Mapping[str, str | Path | Image]", grid: "str | Path | Image | None", folder: Path
) -> list[Sample]:
    """Write images (by prompt) to `folder`/images, and the grid; returns the samples for the card."""
    if grid is not None:
        _write_image(grid, folder / GRID)
    written = []
    for number, (prompt, image) in enumerate(samples.items()):
        written.append(Sample(f"images/sample_{number}.png", prompt or "-"))
        _write_image(image, folder / written[-1].path)
    return written


def push_to_hub(
    adapter: Adapter,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    path_in_repo: str = "",
    endpoint: str | None = None,
    **content: Any,
) -> "CommitInfo":
    """Push an adapter to the Hub in one commit.

    A missing repository or branch is created. A model card that this package did not write is not changed.

    Args:
        adapter: The adapter.
        repo_id: The repository: owner/name, or only the name for a repository of the token's owner.
        private: Whether a new repository is private; None uses the account's default.
        revision: The branch; None uses main.
        token: The access token; None uses the saved one.
        commit_message: The commit's message.
        create_pr: Whether to open a pull request instead of committing to the branch.
        path_in_repo: The folder for all files, in a repository of several adapters (`subfolder=` loads it).
        endpoint: The address of the Hub; None uses the default.
        **content: Arguments of `write_folder`.

    Returns:
        The Hub's description of the commit.

    Raises:
        HubError: The Hub rejects the request, or cannot be reached.
        AdapterError: Something cannot be read or written.
    """
    from huggingface_hub import HfApi

    if "/" in repo_id and not is_repo_id(repo_id):
        raise AdapterError(f"{repo_id} is not a repository: write owner/name")
    api, path_in_repo = HfApi(endpoint=endpoint, token=token), path_in_repo.strip("/")
    content["subfolder"] = path_in_repo or None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(adapter, folder, repo_id, **content)  # fail before an empty repository is created
        name = _make_repository(api, repo_id, private, revision)
        if name != repo_id:
            write_folder(adapter, folder, name, **content)  # again, since the card contains the full repository name
        if not _card_is_ours(api, name, revision, f"{path_in_repo}/{CARD}" if path_in_repo else CARD):
            (folder / CARD).unlink()
        with hub_errors(name, revision):
            return api.upload_folder(
                repo_id=name,
                folder_path=folder,
                path_in_repo=path_in_repo or None,
                revision=revision,
                commit_message=commit_message or f"Push {adapter!r}",
                create_pr=create_pr,
                delete_patterns=_OF_COMPONENTS,
            )


def _make_repository(api: Any, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Create the repository and the branch if they are missing; returns the repository as owner/name."""
    with hub_errors(repo_id, revision):
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not re.fullmatch(r"refs/pr/\d+|[0-9a-f]{40}", revision):
            api.create_branch(name, branch=revision, exist_ok=True)
    return name


def _card_is_ours(api: Any, repo_id: str, revision: str | None, place: str) -> bool:
    """Whether the card may be replaced: it does not exist, or this package wrote it."""
    try:
        with hub_errors(repo_id, revision, place):
            card = api.hf_hub_download(repo_id, place, revision=revision)
    except HubError as error:
        if is_missing_there(error.__cause__):
            return True
        raise
    return MARK in Path(card).read_text(encoding="utf-8")


def _name_base_model(file: Path, base_model: str) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_image(image: "str | Path | Image", file: Path) -> None:
    """Write an image as a PNG file."""
    from PIL import Image, UnidentifiedImageError

    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, Image.Image):
        image.save(file)
        return
    try:
        with Image.open(image) as opened:
            opened.save(file)
    except (OSError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or "not an image that can be read"
        raise AdapterError(f"{image}: {reason}") from None
