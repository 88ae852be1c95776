"""Pushes beside training: in order, again when the Hub is in trouble, and never at the cost of the local file."""

import shutil
import threading
import time

import pytest

from lora_adapters import AdapterError
from lora_adapters.convert.storage.hub_errors import HubError
from lora_adapters.hub.background import BackgroundPush, FailedPush, download_state
from tests.lora_adapters.conftest import GOLDEN
from tests.lora_adapters.hub_server import TOKEN, Repo

LIERLA = GOLDEN / "sd15" / "lierla.safetensors"


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    for number in (1, 2, 3):
        (folder / f"x-{number}.safetensors").write_bytes(b"%d" % number * 2000)
    return folder


@pytest.fixture(autouse=True)
def _no_waiting_in_the_client(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def push(**options):
    return BackgroundPush("me/x", token=TOKEN, **{"wait": 0.01, **options})


@pytest.mark.parametrize("background", [True, False])
def test_files_and_states_in_order(hub, output, background) -> None:
    (output / "x-state").mkdir()
    (output / "x-state" / "optimizer.pt").write_bytes(b"state")
    with push(path_in_repo="/runs/1/", background=background) as pushes:
        pushes.file(output / "x-1.safetensors")
        pushes.file(output / "x-2.safetensors")
        pushes.folder(output / "x-state", message="the state")
    assert pushes.failures == []
    repo = hub.repos["me/x"]
    assert repo.private
    assert repo.messages[1:] == ["Push x-1.safetensors", "Push x-2.safetensors", "the state"]
    assert repo.files()["runs/1/x-2.safetensors"] == b"2" * 2000
    assert repo.files()["runs/1/x-state/optimizer.pt"] == b"state"
    assert sorted(entry.name for entry in output.iterdir()) == [f"x-{n}.safetensors" for n in (1, 2, 3)] + ["x-state"]


def test_training_is_not_kept_waiting_and_may_remove_its_files(hub, output) -> None:
    pushes = push()
    with hub.lock:  # the Hub answers nobody meanwhile
        started = time.monotonic()
        pushes.file(output / "x-1.safetensors")
        pushes.file(output / "x-2.safetensors")
        assert time.monotonic() - started < 1
        (output / "x-1.safetensors").unlink()
        (output / "new").write_bytes(b"later")
        (output / "new").replace(output / "x-2.safetensors")
    assert pushes.close() == []
    assert hub.repos["me/x"].files()["x-1.safetensors"] == b"1" * 2000
    assert hub.repos["me/x"].files()["x-2.safetensors"] == b"2" * 2000
    assert (output / "x-2.safetensors").read_bytes() == b"later"


def test_a_failed_push_is_tried_again(hub, output) -> None:
    pushes = push()
    hub.fail(2, "/commit/")
    pushes.file(output / "x-1.safetensors")
    assert pushes.close() == []
    assert sum("/commit/" in path for _, path in hub.requests) == 3
    assert "x-1.safetensors" in hub.repos["me/x"].files()


def test_what_fails_in_the_end_is_reported_and_stays_on_the_disk(hub, output, caplog) -> None:
    pushes = push(attempts=3)
    hub.fail(3, "/commit/")
    pushes.file(output / "x-1.safetensors")
    pushes.file(output / "x-2.safetensors")
    pushes.file(output / "gone.safetensors")
    failures = {failed.path.name: failed.reason for failed in pushes.close()}
    assert set(failures) == {"x-1.safetensors", "gone.safetensors"}
    assert failures["x-1.safetensors"].startswith("the Hub refused with 503 for me/x")
    assert failures["gone.safetensors"] == "No such file or directory"
    assert f"{output / 'x-1.safetensors'} was not pushed: the Hub refused" in caplog.text
    assert (output / "x-1.safetensors").read_bytes() == b"1" * 2000
    assert not list(output.glob(".push-*"))
    assert "x-2.safetensors" in hub.repos["me/x"].files()


def test_what_cannot_get_better_is_not_tried_again(hub, output) -> None:
    pushes = push()
    del hub.repos["me/x"]
    pushes.file(output / "x-1.safetensors")
    (failed,) = pushes.close()
    assert isinstance(failed, FailedPush)
    assert "the Hub has no repository me/x" in failed.reason
    assert sum("/preupload/" in path for _, path in hub.requests) == 1


def test_close_does_not_wait_for_ever(hub, output) -> None:
    pushes = push()
    with hub.lock:
        pushes.file(output / "x-1.safetensors")
        pushes.file(output / "x-2.safetensors")
        failed = pushes.close(timeout=0.2)
        assert [one.path.name for one in failed] == ["x-1.safetensors", "x-2.safetensors"]
        assert failed[0].reason == "not done within 0.2 s"
    assert pushes.close() is failed
    with pytest.raises(AdapterError, match="was closed"):
        pushes.file(output / "x-3.safetensors")
    pushes._thread.join(10)


def test_a_wrong_token_shows_before_training(hub) -> None:
    with pytest.raises(HubError, match="log in with"):
        BackgroundPush("me/x")
    with pytest.raises(HubError, match="does not permit this"):
        BackgroundPush("me/x", token="hf_reader")
    with pytest.raises(AdapterError, match="repo_type must be one of model, dataset, space, got models"):
        push(repo_type="models")
    assert not [thread for thread in threading.enumerate() if thread.name == "hub-push"]


def test_the_final_adapter_with_its_card(hub, output) -> None:
    shutil.copy(LIERLA, output / "style.safetensors")
    with push(private=False) as pushes:
        pushes.adapter(output / "style.safetensors", trigger_words=["sks"])
        (output / "style.safetensors").unlink()
    assert pushes.failures == []
    files = hub.repos["me/x"].files()
    assert {"pytorch_lora_weights.safetensors", "unet/adapter_config.json", "README.md"} <= set(files)
    assert b"instance_prompt: sks" in files["README.md"]


def test_states_come_back(hub) -> None:
    repo = hub.repos["me/x"] = Repo(private=True)
    repo.put("old", {"runs/x-state/optimizer.pt": b"state", "runs/x-state/a/b": b"1", "large": b"2"}, "put")
    folder = download_state("me/x/runs/x-state:old", token=TOKEN)
    assert (folder / "optimizer.pt").read_bytes() == b"state"
    assert (folder / "a" / "b").exists()
    assert not any("/large" in path for _, path in hub.requests)
    for place, line in {
        "me/x/runs/y:old": "me/x has no folder runs/y in old",
        "me/x/runs/x-state": "me/x has no folder runs/x-state in main",
        "me/x/runs/x-state:none": "me/x has no revision none",
        "me/x": r"me/x is not owner/name/folder\[:revision",
        "me/x/y::models": "repo_type must be one of",
    }.items():
        with pytest.raises(AdapterError, match=line):
            download_state(place, token=TOKEN)
    with pytest.raises(HubError, match="the Hub has no repository me/x, or it is private"):
        download_state("me/x/runs/x-state:old2")
