"""Uploads of saved adapters and states to the Hub while training continues."""

import logging
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.storage.atomic import link_or_copy
from lora_adapters.convert.storage.hub_errors import HubError, hub_errors

logger = logging.getLogger(__name__)

REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class FailedPush:
    """A file or folder that could not be pushed. It remains where it was saved."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} was not pushed: {self.reason}"


@dataclass(frozen=True)
class _Job:
    path: Path  # as it was saved
    kept: Path  # the same contents under a private name, so that nothing changes them
    send: Callable[[Path], None]


class BackgroundPush:
    """Pushes files and folders to one repository, in order, in a background thread.

        with BackgroundPush("me/style", private=True) as push:
            push.file(output / "style-000001.safetensors")
            ...
        for failed in push.failures: ...

    The repository is created at once, so that a wrong name or token is reported before hours of training. After that,
    nothing raises: pushes that fail after all attempts are in `failures`, and `close` logs them. Files are kept by hard
    links (or copies on file systems without links) until they are sent, so that training can replace or delete them.

    The thread is a daemon, unlike that of `HfApi.run_as_future`: an upload that hangs must not prevent the program from
    exiting.

    Args:
        repo_id: The repository, owner/name.
        repo_type: "model", "dataset" or "space".
        private: Whether a new repository is private; None is the account's default.
        path_in_repo: The folder in the repository.
        revision: The branch, which is created if it is missing; None is main.
        token: The access token; None uses the saved one.
        endpoint: The Hub's address; None uses the default.
        background: If False, each call returns when its push is done or has failed.
        attempts: The total number of attempts for a push that fails temporarily.
        wait: Seconds before the second attempt; the time is doubled for each further attempt.

    Raises:
        HubError: The Hub refuses the repository, or cannot be reached.
        AdapterError: An argument is invalid.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        repo_type: Literal["model", "dataset", "space"] = "model",
        private: bool | None = True,
        path_in_repo: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
        background: bool = True,
        attempts: int = 6,
        wait: float = 5.0,
    ):
        from huggingface_hub import HfApi

        if repo_type not in REPO_TYPES:
            raise AdapterError(f"repo_type must be one of {', '.join(REPO_TYPES)}, got {repo_type}")
        if attempts < 1:
            raise AdapterError(f"attempts must be at least 1, got {attempts}")
        self.repo_type, self.revision, self.token = repo_type, revision, token
        self.path_in_repo = path_in_repo.strip("/")
        self.attempts, self.wait = attempts, wait
        self.failures: list[FailedPush] = []
        self._api = HfApi(endpoint=endpoint, token=token)
        with hub_errors(repo_id, revision):
            made = self._api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            self.repo_id = made.repo_id
            if revision is not None:
                self._api.create_branch(self.repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        self._closing, self._closed = threading.Event(), False
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._waiting: list[_Job] = []  # unfinished jobs, in order
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True) if background else None
        if self._thread is not None:
            self._thread.start()

    def file(self, path: str | Path, message: str | None = None) -> None:
        """Push a file under its own name into `path_in_repo`, in one commit."""
        path = Path(path)

        def send(kept: Path) -> None:
            self._api.upload_file(
                path_or_fileobj=kept,
                path_in_repo=self._place(path.name),
                commit_message=message or f"Push {path.name}",
                **self._where(),
            )

        self._add(path, send)

    def folder(self, path: str | Path, message: str | None = None) -> None:
        """Push a folder, such as a saved training state, under its own name into `path_in_repo`, in one commit."""
        path = Path(path)

        def send(kept: Path) -> None:
            self._api.upload_folder(
                folder_path=kept,
                path_in_repo=self._place(path.name),
                commit_message=message or f"Push {path.name}",
                **self._where(),
            )

        self._add(path, send)

    def adapter(self, path: str | Path, message: str | None = None, **content: Any) -> None:
        """Push an adapter's file as `Adapter.push_to_hub` does, with PEFT's folders and a model card.

        Args:
            path: The adapter's file.
            message: The commit's message.
            **content: The contents of the card; see `lora_adapters.hub.repository.write_folder`.

        Raises:
            AdapterError: The repository is not a model repository.
        """
        from lora_adapters.convert.adapter import Adapter

        from .repository import push_to_hub

        if self.repo_type != "model":
            raise AdapterError(f"{self.repo_id} is a {self.repo_type}: adapters need a model repository")
        path = Path(path)

        def send(kept: Path) -> None:
            options = {"revision": self.revision, "token": self.token, "endpoint": self._api.endpoint}
            options["path_in_repo"] = self.path_in_repo
            push_to_hub(Adapter.load(kept), self.repo_id, commit_message=message, **options, **content)  # type: ignore[arg-type]

        self._add(path, send)

    def close(self, timeout: float | None = None) -> list[FailedPush]:
        """Wait for unfinished pushes, and log the failed ones.

        Args:
            timeout: The maximum time to wait in seconds; pushes that are not done by then have failed.

        Returns:
            The failed pushes.
        """
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            if self._thread is not None:
                self._thread.join(timeout)
                self._closing.set()  # no further attempts
            with self._lock:
                for job in self._waiting:
                    self.failures.append(FailedPush(job.path, f"not done within {timeout} s"))
                self._waiting.clear()
            for failed in self.failures:
                logger.error("%s", failed)
        return self.failures

    def __enter__(self) -> "BackgroundPush":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- the thread ------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> str:
        return f"{self.path_in_repo}/{name}" if self.path_in_repo else name

    def _where(self) -> dict[str, Any]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type, "revision": self.revision}

    def _add(self, path: Path, send: Callable[[Path], None]) -> None:
        if self._closed:
            raise AdapterError(f"{path}: pushing to {self.repo_id} was closed")
        try:
            job = _Job(path, _held(path), send)
        except OSError as error:
            self.failures.append(FailedPush(path, error.strerror or str(error)))
            return
        with self._lock:
            self._waiting.append(job)
        if self._thread is None:
            self._do(job)
        else:
            self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)

    def _do(self, job: _Job) -> None:
        try:
            reason = self._try(job)
        finally:
            shutil.rmtree(job.kept.parent, ignore_errors=True)
        with self._lock:
            if job in self._waiting:  # otherwise `close` has already counted it as failed
                self._waiting.remove(job)
                if reason is not None:
                    self.failures.append(FailedPush(job.path, reason))

    def _try(self, job: _Job) -> str | None:
        """Push, with further attempts after temporary failures; returns the reason if the push failed."""
        reason, delay = "", self.wait
        for attempt in range(1, self.attempts + 1):
            try:
                with hub_errors(self.repo_id, self.revision):
                    job.send(job.kept)
            except AdapterError as error:
                reason = str(error)
                if not (isinstance(error, HubError) and error.transient) or attempt == self.attempts:
                    break
                logger.warning("pushing %s failed, again in %g s: %s", job.path.name, delay, reason)
                if self._closing.wait(delay):
                    break
                delay *= 2
            except Exception as error:  # a bug here or in a library must not end the thread and all later pushes
                logger.exception("pushing %s", job.path.name)
                return f"{type(error).__name__}: {error}"
            else:
                return None
        return reason


def _held(path: Path) -> Path:
    """A copy of a file or folder under a hidden name beside it, made of hard links if the file system supports them."""
    place = Path(tempfile.mkdtemp(prefix=".push-", dir=path.parent))
    kept = place / path.name
    try:
        if path.is_dir():
            shutil.copytree(path, kept, copy_function=link_or_copy)
        else:
            link_or_copy(path, kept)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(place, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    return kept


def download_state(place: str, *, token: str | bool | None = None, endpoint: str | None = None) -> Path:
    """Download a training state from the Hub to the Hub library's cache.

    Args:
        place: `owner/name/folder[:revision[:repo_type]]`, as for kohya's --resume with --resume_from_huggingface. The
            revision defaults to main, repo_type to model.
        token: The access token; None uses the saved one.
        endpoint: The Hub's address; None uses the default.

    Returns:
        The local folder.

    Raises:
        AdapterError: `place` does not have this form, or the folder does not exist.
        HubError: The Hub refuses the request, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, *rest = place.split(":")
    owner, _, tail = name.partition("/")
    repo, _, folder = tail.partition("/")
    folder = folder.strip("/")
    if not (owner and repo and folder) or len(rest) > 2:
        raise AdapterError(f"{place} is not owner/name/folder[:revision[:repo_type]]")
    repo_id, revision = f"{owner}/{repo}", (rest[0] or None) if rest else None
    repo_type = rest[1] if len(rest) == 2 and rest[1] else "model"
    if repo_type not in REPO_TYPES:
        raise AdapterError(f"{place}: repo_type must be one of {', '.join(REPO_TYPES)}, got {repo_type}")
    with hub_errors(repo_id, revision):
        where: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
        snapshot = snapshot_download(repo_id, allow_patterns=[f"{folder}/*"], token=token, endpoint=endpoint, **where)
    state = Path(snapshot) / folder
    if not state.is_dir() or not any(state.iterdir()):
        raise AdapterError(f"{repo_id} has no folder {folder} in {revision or 'main'}")
    return state
