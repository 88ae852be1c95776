"""Pushes of a training, with the real client against a Hub of our own."""

import functools
import hashlib
import threading

import pytest
import torch
import yaml
from diffusers.loaders import lora_base

from lora_adapters import Adapter
from lora_adapters.hub.background import BackgroundPush
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.train_network import main
from lora_adapters.train.training import uploads
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import prepare
from lora_adapters.train.training.uploads import Uploads, shared_words, state_folder
from tests.lora_adapters.hub_server import TOKEN, Repo

ME = {"huggingface_repo_id": "me/x", "huggingface_token": TOKEN}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Tries again at once, and not often."""
    monkeypatch.setattr(uploads, "BackgroundPush", functools.partial(BackgroundPush, wait=0.01, attempts=3))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def head(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_a_training_is_pushed_as_it_goes_and_loads_from_the_hub(hub, basics, tmp_path, monkeypatch) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 2")
    options = {
        "output_name": "style",
        "save_every_n_steps": 1,
        "save_last_n_steps": 1,  # older ones are deleted while they may still wait to be pushed
        "save_state_on_train_end": True,
        "save_state_to_huggingface": True,
        "sample_every_n_steps": 3,
        "sample_prompts": str(prompts),
        "metadata_license": "mit",
        "metadata_trigger_phrase": "on white",
        "metadata_description": "Shapes.",
        "metadata_tags": "shapes, toys",
    }
    hub.fail(1, "/commit/")
    made = train(settings(**basics, **ME, **options))
    assert made.not_pushed == []
    repo, output = hub.repos["me/x"], tmp_path / "out"
    assert repo.private
    steps = [f"style-step{step:08d}.safetensors" for step in (1, 2, 3)]
    names = [*steps, "style.safetensors", "style-state"]
    assert repo.messages[1:] == [*(f"Push {name}" for name in names), "Push style.safetensors with its card"]
    files = repo.files()
    assert files["style.safetensors"] == (output / "style.safetensors").read_bytes()
    assert not (output / steps[0]).exists()
    assert not list(output.glob(".push-*"))
    assert files["samples.png"][:4] == b"\x89PNG"
    card = head(files["README.md"])
    assert (card["license"], card["instance_prompt"]) == ("mit", "on white")
    assert card["widget"] == [{"text": "-", "output": {"url": "samples.png"}}]
    assert {"shapes", "toys", "lora", "lierla"} <= set(card["tags"])
    assert "Shapes." in files["README.md"].decode()
    assert "| Steps | 3 |" in files["README.md"].decode()

    monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    chosen = lora_base._best_guess_weight_name("me/x", file_extension=".safetensors")
    assert chosen == "pytorch_lora_weights.safetensors"
    back = Adapter.load("me/x", token=TOKEN)
    for module, pair in Adapter.load(output / "style.safetensors").modules.items():
        torch.testing.assert_close(back.modules[module].delta(), pair.delta(), rtol=1e-5, atol=1e-8)
    state = state_folder(settings(resume="me/x/style-state", resume_from_huggingface=True, huggingface_token=TOKEN))
    assert (state / "state.pt").read_bytes() == (output / "style-state" / "state.pt").read_bytes()


def test_training_does_not_wait_for_the_hub(hub, tmp_path) -> None:
    made = Uploads(settings(**ME, huggingface_path_in_repo="a/"))
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"1" * 2000)
    with hub.lock:  # the Hub answers nobody meanwhile
        made.file(file)
        assert file.read_bytes() == b"1" * 2000
        assert "a/x.safetensors" not in hub.repos["me/x"].files()
    assert made.finish() == []
    assert hub.repos["me/x"].files()["a/x.safetensors"] == b"1" * 2000


def test_what_was_not_pushed_is_reported_at_the_end_and_on_the_disk(hub, basics, tmp_path, capsys) -> None:
    hub.fail(10**6, "/commit/")
    argv = [f"--{key}={value}" for key, value in {**basics, **ME, "max_train_steps": 1}.items()]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert (
        said.splitlines()[-1]
        == f"error: 2 of the saves did not reach the Hub (see above); they are in {tmp_path / 'out'}"
    )
    assert "last.safetensors was not pushed: the Hub refused with 503 for me/x" in said
    assert len(Adapter.load(tmp_path / "out" / "last.safetensors").modules) > 200
    assert list(hub.repos["me/x"].files()) == [".gitattributes"]


def test_pushes_finish_also_where_training_fails(hub, basics, monkeypatch) -> None:
    from lora_adapters.train.training import loop

    step = loop._step

    def failing(run, number, *rest):
        if number == 2:
            raise TrainingError("the loss is nan")
        return step(run, number, *rest)

    monkeypatch.setattr(loop, "_step", failing)
    with pytest.raises(TrainingError, match="nan"):
        train(settings(**basics, **ME, save_every_n_steps=1))
    assert "at-step00000002.safetensors" in hub.repos["me/x"].files()
    assert not [thread for thread in threading.enumerate() if thread.name == "hub-push" and thread.is_alive()]


def test_a_wrong_repository_or_token_shows_before_anything_is_loaded(hub, basics, monkeypatch) -> None:
    monkeypatch.setattr("lora_adapters.train.training.setup.load_base_models", lambda *args: pytest.fail("loaded"))
    for wrong, line in {
        ("me/x", "hf_reader"): "--huggingface_repo_id: the token does not permit this for me/x",
        ("me/x", None): "log in with",
        ("a/b/c", TOKEN): "--huggingface_repo_id: a/b/c",
    }.items():
        given = dict(zip(("huggingface_repo_id", "huggingface_token"), wrong, strict=True))
        with pytest.raises(TrainingError, match=line) as caught:
            prepare(settings(**basics, **given))
        assert "\n" not in str(caught.value)


def test_a_dry_run_makes_no_repository(hub, basics) -> None:
    assert prepare(settings(**basics, **ME, dry_run=True)).uploads is None
    assert hub.repos == {}


def test_of_a_dataset_repository_only_the_files_are_asked(hub, tmp_path, monkeypatch) -> None:
    made = Uploads.__new__(Uploads)
    made.settings, made.is_model = settings(**ME, huggingface_repo_type="dataset"), False
    made.final(tmp_path / "x.safetensors", [], None)  # nothing to push with: a card would need `push`


def test_states_come_from_the_hub(hub) -> None:
    repo = hub.repos["me/x"] = Repo()
    repo.put("main", {"runs/x-state/state.pt": b"1"}, "put")
    folder = state_folder(settings(resume="me/x/runs/x-state:main", resume_from_huggingface=True))
    assert hashlib.sha256((folder / "state.pt").read_bytes()).digest() == hashlib.sha256(b"1").digest()
    for place, line in {"me/x": "me/x is not owner/name/folder", "me/x/y": "has no folder y in main"}.items():
        with pytest.raises(TrainingError, match=f"--resume: .*{line}"):
            state_folder(settings(resume=place, resume_from_huggingface=True))


def test_words_that_every_caption_has() -> None:
    assert shared_words(["sks, a dog, grass", "a cat, sks", "sks"]) == ["sks"]
    assert shared_words(["a photo of sks dog"] * 2) == ["a photo of sks dog"]
    assert shared_words(["alone"]) == []
    assert shared_words(["a", "b"]) == []


def test_options_without_a_repository() -> None:
    for name in ("huggingface_path_in_repo", "huggingface_repo_type"):
        with pytest.raises(TrainingError, match=f"--{name} needs"):
            uploads.check_uploads(settings(**{name: "model"}))
    with pytest.raises(TrainingError, match="public or private"):
        uploads.check_uploads(settings(huggingface_repo_id="me/x", huggingface_repo_visibility="open"))


def test_a_training_starts_from_a_repository(hub, basics, tmp_path) -> None:
    first = train(settings(**basics, **ME))
    options = {**basics, "huggingface_token": TOKEN, "output_dir": str(tmp_path / "second"), "learning_rate": 1e-9}
    second = train(settings(**options, network_weights="me/x"))
    for name, one in first.adapter.modules.items():
        torch.testing.assert_close(second.adapter.modules[name].delta(), one.delta(), rtol=1e-3, atol=1e-7)
    merged = prepare(settings(**options, base_weights=["me/x"]))
    name = next(name for name in first.adapter.modules if name.component == "unet")
    layer = merged.models.denoiser.get_submodule(name.path)
    plain = prepare(settings(**options)).models.denoiser.get_submodule(name.path)
    delta = first.adapter.modules[name].delta()
    torch.testing.assert_close(layer.base_layer.weight, plain.base_layer.weight + delta.reshape(plain.weight.shape))


def test_a_repository_that_is_not_there_is_named_before_the_model_is_loaded(hub, basics, monkeypatch) -> None:
    monkeypatch.setattr("lora_adapters.train.training.setup.load_base_models", lambda *_: pytest.fail("loaded"))
    with pytest.raises(TrainingError, match=r"--network_weights me/nothing"):
        prepare(settings(**basics, network_weights="me/nothing", huggingface_token=TOKEN))
