"""What is saved, also on the Hugging Face Hub; and states to resume from there."""

import argparse
import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from lora_adapters.train.errors import TrainingError

log = logging.getLogger(__name__)


class Uploads:
    """Uploads to --huggingface_repo_id, which is made (private unless asked otherwise) when training starts."""

    def __init__(self, settings: argparse.Namespace):
        self.settings, self.pending = settings, []  # type: ignore[var-annotated]
        self.kind = settings.huggingface_repo_type or "model"
        self.api = HfApi(token=settings.huggingface_token)
        private = settings.huggingface_repo_visibility != "public"
        try:
            self.api.create_repo(settings.huggingface_repo_id, repo_type=self.kind, private=private, exist_ok=True)
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise TrainingError(f"--huggingface_repo_id {settings.huggingface_repo_id}: {_line(error)}") from error

    def file(self, path: Path) -> None:
        """Upload a saved file."""
        self._start(self.api.upload_file, path_or_fileobj=str(path), path_in_repo=self._place(path))

    def state(self, folder: Path) -> None:
        """Upload a saved state, with --save_state_to_huggingface."""
        if self.settings.save_state_to_huggingface:
            self._start(self.api.upload_folder, folder_path=str(folder), path_in_repo=self._place(folder))

    def finish(self) -> None:
        """Wait for uploads in the background; a failed one is reported, the files themselves are on the disk."""
        for future in self.pending:
            try:
                future.result()
            except (HfHubHTTPError, OSError, ValueError) as error:
                log.error("upload failed: %s", _line(error))
        self.pending = []

    def _start(self, upload: Any, **arguments: Any) -> None:
        background = self.settings.async_upload
        try:
            started = upload(
                repo_id=self.settings.huggingface_repo_id, repo_type=self.kind, run_as_future=background, **arguments
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            # Hours of training must not end with the network: what was to be uploaded is saved on the disk.
            log.error("upload failed: %s", _line(error))
            return
        if isinstance(started, Future):
            self.pending.append(started)

    def _place(self, path: Path) -> str:
        folder = (self.settings.huggingface_path_in_repo or "").strip("/")
        return f"{folder}/{path.name}" if folder else path.name


def check_uploads(settings: argparse.Namespace) -> None:
    """Raise TrainingError for upload options without a repository, or with values that do not exist."""
    for name in ("repo_type", "path_in_repo", "repo_visibility"):
        if getattr(settings, f"huggingface_{name}") and not settings.huggingface_repo_id:
            raise TrainingError(f"--huggingface_{name} needs --huggingface_repo_id")
    for name in ("save_state_to_huggingface", "async_upload"):
        if getattr(settings, name) and not settings.huggingface_repo_id:
            raise TrainingError(f"--{name} needs --huggingface_repo_id")
    if settings.save_state_to_huggingface and not (settings.save_state or settings.save_state_on_train_end):
        raise TrainingError("--save_state_to_huggingface needs --save_state or --save_state_on_train_end")
    if settings.huggingface_repo_type not in (None, "model", "dataset", "space"):
        raise TrainingError(f"--huggingface_repo_type {settings.huggingface_repo_type}: model, dataset or space")
    if settings.huggingface_repo_visibility not in (None, "public", "private"):
        raise TrainingError(f"--huggingface_repo_visibility {settings.huggingface_repo_visibility}: public or private")
    if settings.resume_from_huggingface and not settings.resume:
        raise TrainingError("--resume_from_huggingface needs --resume=<user>/<repository>/<folder of the state>")


def state_folder(settings: argparse.Namespace) -> Path:
    """The folder that --resume names; with --resume_from_huggingface it is downloaded.

    It is then written `user/repository/folder[:revision[:repo_type]]`.
    """
    if not settings.resume_from_huggingface:
        return Path(settings.resume)
    name, *rest = settings.resume.split(":")
    parts = name.split("/")
    if len(parts) < 3:
        raise TrainingError(f"--resume {settings.resume} is not <user>/<repository>/<folder of the state>")
    folder = "/".join(parts[2:])
    try:
        found = snapshot_download(
            "/".join(parts[:2]),
            revision=rest[0] if rest and rest[0] else None,
            repo_type=rest[1] if len(rest) > 1 else "model",
            allow_patterns=f"{folder}/*",
            token=settings.huggingface_token,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise TrainingError(f"--resume {settings.resume} cannot be downloaded: {_line(error)}") from error
    return Path(found) / folder


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
