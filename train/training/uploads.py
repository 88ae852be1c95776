"""Uploads saved files to the Hugging Face Hub, and downloads states to resume from."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.storage.sources import is_repo_id
from lora_adapters.hub.background import REPO_TYPES, BackgroundPush, FailedPush, download_state
from lora_adapters.train.errors import OptionError, TrainingError
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.options.values import required

log = logging.getLogger(__name__)

_PATIENCE = 900.0  # seconds to wait for pushes at the end of a run, enough for several retries of each
_INTERRUPTED = 60.0  # seconds to wait if the run ends with an error or Ctrl+C


class Uploads:
    """Pushes to --huggingface_repo_id, which is created (private by default) when training starts.

    Every save is pushed in the background under its own name. The last one is also pushed as
    `pytorch_lora_weights.safetensors`, the name that diffusers looks for, with PEFT folders and a model card.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.is_model = (settings.huggingface_repo_type or "model") == "model"
        repo_type: Any = settings.huggingface_repo_type or "model"  # checked by check_uploads
        try:
            self.push = BackgroundPush(
                required(settings.huggingface_repo_id, "--huggingface_repo_id"),
                repo_type=repo_type,
                private=settings.huggingface_repo_visibility != "public",
                path_in_repo=settings.huggingface_path_in_repo or "",
                token=settings.huggingface_token,
            )
        except AdapterError as error:
            raise TrainingError(f"--huggingface_repo_id: {error}") from error

    def file(self, path: Path) -> None:
        """Push a saved file."""
        self.push.file(path)

    def state(self, folder: Path) -> None:
        """Push a saved state if --save_state_to_huggingface is set."""
        if self.settings.save_state_to_huggingface:
            self.push.folder(folder)

    def final(self, path: Path, captions: Iterable[str], grid: Path | None) -> None:
        """Push the last save with a model card that shows `grid`, the last samples. Only for model repositories."""
        if not self.is_model:
            return
        settings = self.settings
        base = settings.pretrained_model_name_or_path or ""
        phrase = settings.metadata_trigger_phrase
        self.push.adapter(
            path,
            f"Push {path.name} with its card",
            base_model=base if is_repo_id(base) and not Path(base).exists() else None,
            trigger_words=[phrase] if phrase else shared_words(captions),
            description=settings.metadata_description,
            license=settings.metadata_license,
            tags=[tag.strip() for tag in (settings.metadata_tags or "").split(",") if tag.strip()],
            grid=grid,
        )

    def finish(self, interrupted: bool = False) -> list[FailedPush]:
        """Wait for pushes in progress. Returns those that failed, which are logged; their files are on disk."""
        return self.push.close(_INTERRUPTED if interrupted else _PATIENCE)


def shared_words(captions: Iterable[str]) -> list[str]:
    """At most three comma-separated parts that all captions have in common, used as trigger words."""
    parts = [[part.strip() for part in caption.split(",") if part.strip()] for caption in captions]
    if len(parts) < 2:
        return []
    return [part for part in dict.fromkeys(parts[0]) if all(part in other for other in parts)][:3]


def check_uploads(settings: Settings) -> None:
    """Raise TrainingError for upload options without a repository, or with invalid values."""
    for name in ("repo_type", "path_in_repo", "repo_visibility"):
        if getattr(settings, f"huggingface_{name}") and not settings.huggingface_repo_id:
            raise OptionError(f"--huggingface_{name} needs --huggingface_repo_id")
    for name in ("save_state_to_huggingface", "async_upload"):
        if getattr(settings, name) and not settings.huggingface_repo_id:
            raise OptionError(f"--{name} needs --huggingface_repo_id")
    if settings.save_state_to_huggingface and not (settings.save_state or settings.save_state_on_train_end):
        raise OptionError("--save_state_to_huggingface needs --save_state or --save_state_on_train_end")
    if settings.huggingface_repo_type not in (None, *REPO_TYPES):
        raise OptionError(
            f"--huggingface_repo_type {settings.huggingface_repo_type}: not one of {', '.join(REPO_TYPES)}"
        )
    if settings.huggingface_repo_visibility not in (None, "public", "private"):
        raise OptionError(
            f"--huggingface_repo_visibility {settings.huggingface_repo_visibility}: not public or private"
        )
    if settings.resume_from_huggingface and not settings.resume:
        raise OptionError("--resume_from_huggingface needs --resume=<user>/<repository>/<folder of the state>")


def state_folder(settings: Settings) -> Path:
    """The folder of the state to resume from; with --resume_from_huggingface it is downloaded.

    Args:
        settings: The settings; `resume` is a path, or `user/repository/folder[:revision[:repo_type]]` for a download.

    Returns:
        A local folder.

    Raises:
        TrainingError: --resume is missing, or the state cannot be downloaded.
    """
    if not settings.resume_from_huggingface:
        return Path(required(settings.resume, "--resume"))
    options: dict[str, Any] = {"token": settings.huggingface_token}
    try:
        return download_state(required(settings.resume, "--resume"), **options)
    except AdapterError as error:
        raise TrainingError(f"--resume: {error}") from error
