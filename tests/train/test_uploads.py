from types import SimpleNamespace

import pytest

from lora_adapters.train import uploads
from lora_adapters.train.arguments import settings
from lora_adapters.train.errors import TrainingError


class FakeApi:
    """Notes what would be sent."""

    def __init__(self, token=None):
        self.token, self.calls, self.fails = token, [], False

    def __getattr__(self, name):
        def call(*args, **kwargs):
            if self.fails:
                raise OSError("no network")
            self.calls.append((name, args, kwargs))
            return SimpleNamespace()

        return call


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(uploads, "HfApi", FakeApi)
    options = {"huggingface_repo_id": "me/x", "huggingface_token": "t", "huggingface_path_in_repo": "a/"}
    return uploads.Uploads(settings(**options, save_state_to_huggingface=True))


def test_files_and_states_go_into_the_folder(made, tmp_path) -> None:
    made.file(tmp_path / "x.safetensors")
    made.state(tmp_path / "x-state")
    names = [(name, kwargs.get("path_in_repo")) for name, _, kwargs in made.api.calls]
    wanted = [("create_repo", None), ("upload_file", "a/x.safetensors"), ("upload_folder", "a/x-state")]
    assert names == wanted
    assert made.api.calls[0][2]["private"] is True
    assert made.api.token == "t"


def test_a_lost_network_does_not_end_training(made, tmp_path, caplog) -> None:
    made.api.fails = True
    made.file(tmp_path / "x.safetensors")
    assert "upload failed: no network" in caplog.text


def test_resume_downloads_the_state(monkeypatch, tmp_path) -> None:
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(uploads, "snapshot_download", download)
    options = settings(resume="me/x/runs/x-state:main:dataset", resume_from_huggingface=True)
    assert uploads.state_folder(options) == tmp_path / "runs" / "x-state"
    assert (asked["repo"], asked["revision"], asked["repo_type"]) == ("me/x", "main", "dataset")
    with pytest.raises(TrainingError, match="is not <user>/<repository>/<folder"):
        uploads.state_folder(settings(resume="me/x", resume_from_huggingface=True))


def test_options_without_a_repository() -> None:
    for name in ("huggingface_path_in_repo", "huggingface_repo_type"):
        with pytest.raises(TrainingError, match=f"--{name} needs"):
            uploads.check_uploads(settings(**{name: "model"}))
    with pytest.raises(TrainingError, match="public or private"):
        uploads.check_uploads(settings(huggingface_repo_id="me/x", huggingface_repo_visibility="open"))
