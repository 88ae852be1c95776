"""Errors of `huggingface_hub` as messages of one line: the library's own messages have several, with URLs and ids.

Versions before 1.0, which transformers 4 requires, use requests instead of httpx and have fewer error classes; both are
handled here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_adapters.convert.errors import AdapterError

_LOG_IN = "log in with `hf auth login`, or pass token="
_TRY_AGAIN = (408, 409, 412, 425, 429)  # timeouts, a concurrent commit, too many requests


class HubError(AdapterError):
    """The Hub refused a request, does not have the file, or cannot be reached; `__cause__` is the library's error."""

    @property
    def transient(self) -> bool:
        """Whether a retry may succeed: there was no connection, or the server was busy or failed."""
        return any(_is_transient(error) for error in _chain(self.__cause__))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def is_missing_there(error: BaseException | None) -> bool:
    """Whether the Hub answered that the repository does not have the file."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def incomplete_snapshot(error: BaseException) -> Path | None:
    """The folder of a partly cached repository; None for other errors, and for versions before 1.0."""
    path = getattr(error, "snapshot_path", None)
    return Path(path) if path is not None else None


def _network_error() -> type[Exception]:
    """The base class of network errors: httpx's HTTPError or requests' RequestException."""
    from huggingface_hub.errors import HTTPError

    return next((base for base in HTTPError.__mro__ if base.__name__ == "RequestException"), HTTPError)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    # A cache miss is not transient, but its cause may be. Before version 1.0 the miss is an HTTPError too.
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return False
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _TRY_AGAIN
    return isinstance(error, (_network_error(), ConnectionError, TimeoutError))


def _line(error: BaseException) -> str:
    """The server's message, or the error's own, joined to one line."""
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(line.strip() for line in str(said).splitlines() if line.strip())[:300].rstrip(".")


def meaning(error: BaseException, repo: str, revision: str | None = None, file: str | None = None) -> str:
    """Describe an error of `huggingface_hub` about a repository in one line."""
    from huggingface_hub import errors

    what = f"{repo}/{file}" if file else repo
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: ask for access on its page on the Hub, then {_LOG_IN} ({_line(error)})"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no repository {repo}, or it is private and the token has no access: {_LOG_IN}"
    if isinstance(error, errors.DisabledRepoError):
        return f"the Hub has disabled {repo}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision or 'main'}"
    if is_missing_there(error):
        return f"{repo} has no file {file}" if file else f"{repo}: {_line(error)}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{repo} needs a token, but none is set: {_LOG_IN}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        below = error.__cause__
        if below is None or isinstance(below, errors.OfflineModeIsEnabled):
            return f"{what} is not in the local cache, and downloads are turned off (HF_HUB_OFFLINE, local_files_only)"
        why = meaning(below, repo, revision, file)
        return why if _status(below) == 404 else f"{what} is not in the local cache, and {why}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo} cannot be reached in offline mode (HF_HUB_OFFLINE=1)"
    if _status(error) == 404:  # mirrors and proxies do not say what is missing
        return f"the Hub was reached and has no {what}, or it is private and the token has no access (404): {_LOG_IN}"
    if _status(error) == 401:
        return f"the Hub does not accept the token for {repo}, or needs one: {_LOG_IN} ({_line(error)})"
    if _status(error) == 403:
        return f"the token does not permit this for {repo} ({_line(error)})"
    if _status(error) is None and isinstance(error, (_network_error(), ConnectionError, TimeoutError)):
        return f"the Hub cannot be reached for {repo} ({_line(error)})"
    if _status(error) is not None:
        return f"the Hub refused with {_status(error)} for {repo} ({_line(error)})"
    return f"{repo}: {_line(error)}"


@contextmanager
def hub_errors(repo: str, revision: str | None = None, file: str | None = None) -> Iterator[None]:
    """Convert errors of `huggingface_hub` in the block to a HubError with a message of one line."""
    try:
        yield
    except AdapterError:
        raise
    except (_network_error(), OSError, ValueError, RuntimeError) as error:
        raise HubError(meaning(error, repo, revision, file)) from error
