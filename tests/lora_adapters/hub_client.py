"""Points the real huggingface_hub to a HubServer in this process."""

import pytest

from .hub_server import HubServer


def client_at(hub: HubServer, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use `hub` online, with an empty cache, without a stored token and with LFS uploads; monkeypatch undoes it."""
    from huggingface_hub import constants, file_download, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # versions before 1.0 have a copy in file_download
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    set_offline(monkeypatch, False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "stored_tokens"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def set_offline(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """Same as starting the process with HF_HUB_OFFLINE=1 or 0."""
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    reset = getattr(utils, "reset_sessions", None)  # before 1.0, a session keeps its initial state
    if reset is not None:
        reset()
