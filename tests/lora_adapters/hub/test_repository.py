"""Pushing to a Hub and loading from it, with the real client against a server of our own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lora_adapters import Adapter, AdapterError, DyLoraConfig, LycorisConfig
from lora_adapters.convert.formats.metadata import DYLORA_FACTS
from lora_adapters.convert.storage.hub_errors import HubError
from lora_adapters.hub.model_card import MARK, base_model_of, family, kind, model_card
from lora_adapters.hub.repository import write_folder
from tests.lora_adapters.conftest import GOLDEN, expected, make_pipeline
from tests.lora_adapters.golden_outputs import error, outputs
from tests.lora_adapters.hub_client import set_offline
from tests.lora_adapters.hub_server import TOKEN, HubServer, Repo

ROOT = Path(__file__).parents[3]
SD15 = GOLDEN / "sd15"


def golden(name, folder="sd15", **metadata):
    adapter = Adapter.load(GOLDEN / folder / f"{name}.safetensors")
    return Adapter(adapter.modules, {**adapter.metadata, **metadata})


def wanted(name):
    """What kohya's own code puts out with the adapter, and what the model does without it."""
    table = expected("sd15")
    return [{part: table[f"{key}.{part}"] for part in ("text", "unet")} for key in (f"{name}.x1.0", "base")]


def card_of(text):
    _, head, body = str(text).split("---\n", 2)
    return yaml.safe_load(head), body


def test_one_commit_with_everything(hub) -> None:
    adapter = golden("block_dims_alphas_conv", ss_num_train_images="24", ss_learning_rate="0.0001", ss_seed="None")
    grid, sample = Image.new("RGB", (8, 4), "red"), Image.new("RGB", (4, 4), "blue")
    options = {"trigger_words": ["sks", "delft"], "grid": grid, "samples": {"a sks cat": sample}, "license": "mit"}
    info = adapter.push_to_hub("me/style", token=TOKEN, private=True, **options)
    repo = hub.repos["me/style"]
    assert repo.private
    assert repo.messages == ["initial commit", f"Push {adapter!r}"]
    assert info.oid == repo.refs["main"]
    files = repo.files()
    parts = [f"{c}/{f}" for c in adapter.components for f in ("adapter_config.json", "adapter_model.safetensors")]
    names = ["pytorch_lora_weights.safetensors", "README.md", "samples.png", "images/sample_0.png", *parts]
    assert set(files) == {".gitattributes", *names}
    assert json.loads(files["unet/adapter_config.json"])["base_model_name_or_path"] == base_model_of(adapter)
    head, body = card_of(files["README.md"].decode())
    assert head["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert head["instance_prompt"] == "sks, delft"
    assert head["widget"] == [{"text": "a sks cat", "output": {"url": "images/sample_0.png"}}]
    assert {"text-to-image", "stable-diffusion", "lora", "diffusers", "template:sd-lora", "c3lier"} <= set(head["tags"])
    assert "| Training images | 24 |" in body
    assert "| Learning rate | 0.0001 |" in body
    assert "| Seed |" not in body
    assert 'pipe.load_lora_weights("me/style")' in body
    assert "![Samples](samples.png)" in body


def test_back_from_the_hub_it_is_the_same(hub, pipeline) -> None:
    for name in ("block_dims_alphas_conv", "dylora_conv"):
        golden(name).push_to_hub(f"me/{name}", token=TOKEN)
        back, was = Adapter.load(f"me/{name}"), golden(name)
        assert back.dylora == was.dylora
        for module, pair in was.modules.items():
            torch.testing.assert_close(back.modules[module].delta(), pair.delta(), rtol=1e-5, atol=1e-7)
        pipe = pipeline()
        pipe.load_lora_weights(f"me/{name}")
        assert error(outputs(pipe, expected("sd15")), *wanted(name)) < 1e-4
        assert isinstance(pipe.unet.peft_config["default_0"], DyLoraConfig) is (name == "dylora_conv")


STOCK = """
import sys
sys.modules["lora_adapters"] = None  # an import of it would fail
sys.path.insert(0, {root!r})
from peft import PeftModel
from safetensors.torch import save_file
from tests.lora_adapters import conftest
from tests.lora_adapters.golden_outputs import outputs

golden, results = conftest.expected("sd15"), {{}}
pipe = conftest.make_pipeline()
pipe.load_lora_weights("me/x")
results |= {{f"diffusers/{{part}}": value for part, value in outputs(pipe, golden).items()}}
pipe = conftest.make_pipeline()
for part in ("unet", "text_encoder"):
    model = PeftModel.from_pretrained(getattr(pipe, part), "me/x", subfolder=part).get_base_model()
    setattr(pipe, part, model)
results |= {{f"peft/{{part}}": value for part, value in outputs(pipe, golden).items()}}
save_file(results, {out!r})
"""


def test_stock_diffusers_and_stock_peft_load_it(hub, tmp_path) -> None:
    name = "block_dims_alphas_conv"
    golden(name).push_to_hub("me/x", token=TOKEN)
    at = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    script = STOCK.format(root=str(ROOT), out=str(tmp_path / "results"))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **at}, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "results")
    for library in ("diffusers", "peft"):
        parts = {part: found[f"{library}/{part}"] for part in ("text", "unet")}
        assert error(parts, *wanted(name)) < 1e-4


def test_a_second_push_leaves_nothing_of_the_first(hub) -> None:
    golden("lierla").push_to_hub("me/x", token=TOKEN)
    golden("unet_only").push_to_hub("me/x", token=TOKEN, commit_message="again")
    assert hub.repos["me/x"].messages[1:] == [hub.repos["me/x"].messages[1], "again"]
    assert "text_encoder/adapter_config.json" not in hub.repos["me/x"].files()
    assert Adapter.load("me/x").components == ("unet",)


def test_somebodys_own_card_is_left_alone(hub) -> None:
    golden("lierla").push_to_hub("me/x", token=TOKEN)
    repo = hub.repos["me/x"]
    golden("lierla").push_to_hub("me/x", token=TOKEN, trigger_words=["sks"])
    assert b"`sks`" in repo.files()["README.md"]
    own = repo.files()["README.md"].replace(MARK.encode(), b"my own words")
    repo.put("main", {**repo.files(), "README.md": own}, "edited")
    golden("unet_only").push_to_hub("me/x", token=TOKEN)
    assert repo.files()["README.md"] == own


def test_a_branch_is_made(hub) -> None:
    golden("lierla").push_to_hub("style", token=TOKEN, revision="v2")
    assert "README.md" not in hub.repos["me/style"].files("main")
    assert b'load_lora_weights("me/style")' in hub.repos["me/style"].files("v2")["README.md"]
    assert Adapter.load("me/style", revision="v2").rank == golden("lierla").rank


@pytest.mark.parametrize(
    ("repo", "token", "line"),
    [
        ("me/x", None, "does not accept the token for me/x, or needs one: log in with `hf auth login`"),
        ("me/x", "hf_wrong", "the token does not permit this for me/x"),
        ("me/x", "hf_reader", "the token does not permit this for me/x .*rights to create"),
        ("me/x/y", TOKEN, "me/x/y is not a repository"),
        ("me/-x", TOKEN, "me/-x is not a repository"),
    ],
)
def test_what_is_said_and_nothing_is_left(hub, repo, token, line) -> None:
    with pytest.raises(AdapterError, match=line) as caught:
        golden("lierla").push_to_hub(repo, token=token)
    assert "\n" not in str(caught.value)
    assert hub.repos == {}


def test_a_bad_image_makes_no_repository(hub, tmp_path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(AdapterError, match=r"x\.png: not an image"):
        golden("lierla").push_to_hub("me/x", token=TOKEN, grid=tmp_path / "x.png")
    with pytest.raises(AdapterError, match=r"y\.png: No such file"):
        golden("lierla").push_to_hub("me/x", token=TOKEN, grid=tmp_path / "y.png")
    assert hub.repos == {}


def test_a_hub_in_trouble(hub, monkeypatch) -> None:
    hub.fail(99, "/commit/")
    with pytest.raises(HubError, match="the Hub refused with 503 for me/x") as caught:
        golden("lierla").push_to_hub("me/x", token=TOKEN)
    assert caught.value.transient
    assert hub.repos["me/x"].messages == ["initial commit"]


def test_offline_push(hub, monkeypatch) -> None:
    set_offline(monkeypatch, True)
    with pytest.raises(HubError, match="me/x cannot be reached in offline mode") as caught:
        golden("lierla").push_to_hub("me/x", token=TOKEN)
    assert not caught.value.transient


def test_the_server_needs_no_network() -> None:
    with HubServer() as server:
        assert server.endpoint.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("folder", "name", "wanted"),
    [
        ("sd15", "lierla", "LierLa"),
        ("sd15", "c3lier", "C3Lier"),
        ("sd15", "dylora_conv", "DyLoRA"),
        ("sdxl", "c3lier_xl", "C3Lier"),
    ],
)
def test_kind_and_family(folder, name, wanted) -> None:
    adapter = golden(name, folder)
    assert kind(adapter) == wanted
    head, body = card_of(model_card(adapter, "me/x"))
    assert wanted.lower() in head["tags"]
    assert ("stable-diffusion-xl" in head["tags"]) is (folder == "sdxl")
    assert f"| Type | {wanted} |" in body
    assert ("set_rank(pipe, " in body) is (wanted == "DyLoRA")
    assert not [fact for fact in DYLORA_FACTS if f"{fact}=" in body]  # what they mean stands in words
    assert "stable-diffusion-xl-base-1.0" in head["base_model"] if folder == "sdxl" else "v1-5" in head["base_model"]


def test_base_model_is_what_the_metadata_names() -> None:
    assert base_model_of(golden("lierla", ss_sd_model_name="me/my-model")) == "me/my-model"
    assert base_model_of(golden("lierla", ss_sd_model_name="model.safetensors")).startswith("stable-diffusion-v1-5/")
    assert base_model_of(golden("lierla", ss_sd_model_name="models/x.safetensors")).startswith("stable-diffusion-v1-5/")
    assert "v-prediction" in family(golden("lierla", ss_base_model_version="sd_v2_v"))[0]


def test_metadata_cannot_break_the_page() -> None:
    head, body = card_of(
        model_card(
            golden("lierla", ss_training_comment="a | b\n\n<script>", ss_output_name="x\n# y"),
            "me/x",
            trigger_words=["it's: #1", '"quoted"'],
        )
    )
    assert "| Comment | a \\| b &lt;script&gt; |" in body
    assert "# x # y" in body
    assert head["instance_prompt"] == 'it\'s: #1, "quoted"'
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "README", "exec")
    assert repr('it\'s: #1, "quoted"') in code


def test_the_folder_alone(tmp_path) -> None:
    folder = write_folder(golden("dylora"), tmp_path / "out", "me/x", dtype=torch.float16)
    assert Adapter.load(folder).dylora == golden("dylora").dylora
    assert next(iter(Adapter.load(folder).modules.values())).up.dtype == torch.float16


def test_the_snippet_of_the_card_runs(hub, tmp_path) -> None:
    """As it stands, with the base model on the Hub too."""
    from diffusers import StableDiffusionPipeline

    from lora_adapters import LierLaConfig
    from tests.train.conftest import build_sd1

    place = build_sd1(tmp_path / "base")
    table = {str(one.relative_to(place)): one.read_bytes() for one in place.rglob("*") if one.is_file()}
    hub.repos["me/base"] = Repo()
    hub.repos["me/base"].put("main", table, "put")
    base = StableDiffusionPipeline.from_pretrained(place)
    base.unet.add_adapter(LierLaConfig(r=2), adapter_name="a")
    adapter = Adapter.from_pipeline(base, "a")
    adapter.push_to_hub("me/style", token=TOKEN, base_model="me/base", trigger_words=["a red disc"])
    code = hub.repos["me/style"].files()["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line and "import" not in line]) == 3
    names: dict = {}
    exec(code, names)
    assert names["image"].size == (64, 64)
    assert names["pipe"].get_list_adapters() == {"unet": ["default_0"]}


def test_an_adapter_of_other_kinds(hub, tmp_path) -> None:
    """One file, without PEFT's folders, and a card that says how it is loaded."""
    unet = make_pipeline("sd15").unet
    unet.add_adapter(LycorisConfig(r=2, algo="loha", preset="full", train_norm=True), adapter_name="default")
    adapter = Adapter.from_models({"unet": unet})
    adapter.push_to_hub("me/loha", token=TOKEN)
    files = hub.repos["me/loha"].files()
    assert set(files) == {".gitattributes", "pytorch_lora_weights.safetensors", "README.md"}
    head, body = card_of(files["README.md"].decode())
    assert {"loha", "norm", "lora"} <= set(head["tags"])
    assert "| Type | LoHa, norm |" in body
    assert "| Rank | 2 |" in body
    assert "```python\nimport lora_adapters\nfrom diffusers import" in body
    assert "for PEFT" not in body
    again = Adapter.load("me/loha", token=TOKEN)
    assert again.kinds == adapter.kinds
