"""Repositories as sources: what is found in them, and what is said when they cannot be had."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from lora_adapters.convert import Adapter, AdapterError
from lora_adapters.convert.storage.hub_errors import HubError
from lora_adapters.convert.storage.sources import DIFFUSERS_NAME
from tests.lora_adapters.hub_client import set_offline
from tests.lora_adapters.hub_server import TOKEN, Repo

GOLDEN = Path(__file__).parents[2] / "golden" / "sd15"
LIERLA, C3LIER = GOLDEN / "lierla.safetensors", GOLDEN / "c3lier.safetensors"


def put(server, name, files, branch="main", **options):
    repo = server.repos.setdefault(name, Repo(**options))
    repo.put(branch, {path: Path(file).read_bytes() for path, file in files.items()}, "put")


def same(one, other):
    assert one.modules.keys() == other.modules.keys()
    for name, pair in one.modules.items():
        assert torch.equal(pair.delta(), other.modules[name].delta())


def test_the_name_that_diffusers_picks_costs_two_requests(hub) -> None:
    put(hub, "me/x", {DIFFUSERS_NAME: LIERLA, "other.safetensors": C3LIER})
    same(Adapter.load("me/x"), Adapter.load(LIERLA))
    assert [method for method, path in hub.requests if "/api/agent" not in path] == ["HEAD", "GET"]
    same(Adapter.load("me/x", weight_name="other.safetensors"), Adapter.load(C3LIER))


def test_the_only_file_a_folder_and_a_revision(hub) -> None:
    put(hub, "me/x", {"style.safetensors": LIERLA})
    put(hub, "me/x", {"a/b/style.safetensors": C3LIER}, branch="v2")
    same(Adapter.load("me/x"), Adapter.load(LIERLA))
    same(Adapter.load("me/x", revision="v2", subfolder="a/b"), Adapter.load(C3LIER))
    with pytest.raises(AdapterError, match="me/x has no folder a/c"):
        Adapter.load("me/x", revision="v2", subfolder="a/c")


def test_peft_folders(hub, tmp_path) -> None:
    Adapter.load(LIERLA).save(tmp_path / "p", "peft")
    files = {str(file.relative_to(tmp_path / "p")): file for file in (tmp_path / "p").rglob("*.*")}
    put(hub, "me/p", {**files, "checkpoint-2/adapter_config.json": LIERLA})
    same(Adapter.load("me/p"), Adapter.load(LIERLA))
    assert not any("checkpoint-2" in path for _, path in hub.requests)


def test_a_folder_with_both_forms_is_read_as_its_repository_would_be(tmp_path) -> None:
    Adapter.load(LIERLA).save(tmp_path, "peft")
    shutil.copy(C3LIER, tmp_path / DIFFUSERS_NAME)
    same(Adapter.load(tmp_path), Adapter.load(C3LIER))


@pytest.mark.parametrize(
    ("name", "options", "line", "cause"),
    [
        ("me/none", {}, "the Hub has no repository me/none, or it is private", RepositoryNotFoundError),
        ("me/private", {}, "the Hub has no repository me/private, or it is private", RepositoryNotFoundError),
        ("me/private", {"token": "hf_reader"}, "the Hub has no repository me/private", RepositoryNotFoundError),
        ("me/gated", {}, "me/gated is gated: ask for access .* restricted", GatedRepoError),
        ("me/x", {"revision": "v9"}, "me/x has no revision v9", RevisionNotFoundError),
        ("me/x", {"weight_name": "no.safetensors"}, "me/x has no file no.safetensors", None),
        ("me/x", {"token": "hf_wrong"}, "does not accept the token for me/x.*Invalid credentials", None),
        ("me/empty", {}, "me/empty contains no adapter", None),
    ],
)
def test_what_is_said(hub, name, options, line, cause) -> None:
    put(hub, "me/x", {DIFFUSERS_NAME: LIERLA})
    put(hub, "me/private", {DIFFUSERS_NAME: LIERLA}, private=True)
    put(hub, "me/gated", {DIFFUSERS_NAME: LIERLA}, gated=True)
    put(hub, "me/empty", {})
    with pytest.raises(AdapterError, match=line) as caught:
        Adapter.load(name, **options)
    assert "\n" not in str(caught.value)
    if cause is not None:
        assert isinstance(caught.value.__cause__, cause)


def test_the_token_opens_them(hub) -> None:
    put(hub, "me/private", {DIFFUSERS_NAME: LIERLA}, private=True)
    put(hub, "me/gated", {DIFFUSERS_NAME: C3LIER}, gated=True)
    same(Adapter.load("me/private", token=TOKEN), Adapter.load(LIERLA))
    same(Adapter.load("me/gated", token=TOKEN), Adapter.load(C3LIER))


@pytest.mark.parametrize("name", [DIFFUSERS_NAME, "style.safetensors"])
def test_offline(hub, monkeypatch, name) -> None:
    put(hub, "me/x", {name: LIERLA, "large.txt": C3LIER})
    with pytest.raises(HubError, match=r"not in the local cache, and downloads are turned off"):
        Adapter.load("me/x", local_files_only=True)
    Adapter.load("me/x")
    asked = len(hub.requests)
    same(Adapter.load("me/x", local_files_only=True), Adapter.load(LIERLA))
    set_offline(monkeypatch, True)
    same(Adapter.load("me/x"), Adapter.load(LIERLA))
    assert len(hub.requests) == asked


def test_no_hub_at_all(hub, monkeypatch) -> None:
    put(hub, "me/x", {DIFFUSERS_NAME: LIERLA})
    hub.__exit__()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's own five attempts
    with pytest.raises(HubError, match="not in the local cache, and the Hub cannot be reached for me/x") as caught:
        Adapter.load("me/x")
    assert caught.value.transient


@pytest.mark.parametrize("weight_name", [None, "x.safetensors"])
def test_a_404_is_an_answer(hub, weight_name) -> None:
    """Mirrors and proxies do not say what is missing."""
    hub.fail(99, status=404)
    with pytest.raises(HubError, match=r"^the Hub was reached and has no me/x/\w+\.safetensors.*\(404\)") as caught:
        Adapter.load("me/x", weight_name=weight_name)
    assert not caught.value.transient


@pytest.mark.parametrize("name", ["../x", "./x", "no-owner", "a/b/c"])
def test_what_is_no_repository(hub, name) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        Adapter.load(name)
    assert hub.requests == []
