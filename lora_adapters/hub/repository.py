"""An adapter on the Hub: the folder that is pushed, and pushing it in one commit."""

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
    """Write what a repository of the adapter holds, and give back the folder.

    `pytorch_lora_weights.safetensors`, the name that diffusers picks by itself, is in kohya's format with one alpha for
    all modules, which stock diffusers reads right; `unet/`, `text_encoder/` and `text_encoder_2/` are what
    `PeftModel.from_pretrained(model, repo_id, subfolder=...)` reads; README.md is the model card.

    samples: pictures (PIL's or files) by the prompts that they were drawn with; grid: one picture of many. Both are
    shown by the card. subfolder: the folder of the repository that it will be in, for the card's snippet. AdapterError
    where something cannot be read or written.
    """
    folder = Path(folder).expanduser()
    base_model = base_model or base_model_of(adapter)
    adapter.save(folder / DIFFUSERS_NAME, fold_alpha=True, dtype=dtype)
    adapter.save(folder, "peft", dtype=dtype)
    for component in adapter.components:
        _name_base_model(folder / component / CONFIG, base_model)
    shown = []
    for number, (prompt, picture) in enumerate((samples or {}).items()):
        shown.append(Sample(f"images/sample_{number}.png", prompt or "-"))
        _write_picture(picture, folder / shown[-1].path)
    if grid is not None:
        _write_picture(grid, folder / GRID)
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
    """Push the adapter's folder (see `write_folder`, which `content` goes to) in one commit; gives back its CommitInfo.

    repo_id: owner/name, or a name of the token's owner. The repository is made where it is missing, private as asked
    (None: as the owner's account has it); so is the branch `revision`. A model card that somebody has taken over (the
    line at its end is gone) is left as it is. path_in_repo: a folder for all of it, which is then loaded with
    `subfolder=`, for repositories of several adapters. HubError, in the Hub library's meaning, where the Hub refuses
    or cannot be reached.
    """
    from huggingface_hub import HfApi

    if "/" in repo_id and not is_repo_id(repo_id):
        raise AdapterError(f"{repo_id} is no owner/name of a repository")
    api, path_in_repo = HfApi(endpoint=endpoint, token=token), path_in_repo.strip("/")
    content["subfolder"] = path_in_repo or None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(adapter, folder, repo_id, **content)  # what cannot be written must not leave an empty repository
        with hub_errors(repo_id, revision):
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not re.fullmatch(r"refs/pr/\d+|[0-9a-f]{40}", revision):
                api.create_branch(name, branch=revision, exist_ok=True)
        if name != repo_id:
            write_folder(adapter, folder, name, **content)  # the card names the whole repository
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
                # parts that an earlier adapter had here and this one does not
                delete_patterns=[f"{part}/{file}" for part in COMPONENTS for file in (CONFIG, WEIGHTS)],
            )


def _card_is_ours(api: Any, repo_id: str, revision: str | None, place: str) -> bool:
    """Whether the card may be written: there is none, or it is one that was written here."""
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


def _write_picture(picture: "str | Path | Image", file: Path) -> None:
    """The picture as a PNG file of the folder."""
    from PIL import Image, UnidentifiedImageError

    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, Image.Image):
        picture.save(file)
        return
    try:
        with Image.open(picture) as opened:
            opened.save(file)
    except (OSError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or "not a picture that can be read"
        raise AdapterError(f"{picture}: {reason}") from None
