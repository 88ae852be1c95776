"""What results keep of their sources: tags, trigger words, names, who may read them; and how ranks are told."""

import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_adapters.convert import Adapter, LowRank, ModuleName
from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.formats.metadata import merged_facts
from lora_adapters.hub.model_card import model_card
from tests.convert.checkpoints import original
from tests.convert.scripts import SD15, fails, run

LIERLA = SD15 / "lierla.safetensors"
TAGS = {"img": {"cat": 5, "dog": 1}, "more": {"car": 5}}


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.fixture
def sources(tmp_path):
    """Two adapters that know what they were trained on."""
    facts = {
        "a": {"ss_tag_frequency": json.dumps({"img": {"cat": 3, "dog": 1}}),
              "modelspec.trigger_phrase": "sks cat, fluffy"},
        "b": {"ss_tag_frequency": json.dumps({"img": {"cat": 2}, "more": {"car": 5}}),
              "modelspec.trigger_phrase": "fluffy, zz", "modelspec.merged_from": "x, y"},
    }  # fmt: skip
    found = []
    for (name, told), file in zip(facts.items(), (SD15 / "unet_only.safetensors", LIERLA), strict=True):
        adapter = Adapter.load(file)
        told = {**adapter.metadata, **told}
        found.append(Adapter(adapter.modules, told).save(tmp_path / f"{name}.safetensors"))
    return found


@pytest.mark.parametrize("program", [["merge"], ["svd-merge", "--new_rank", "4"], ["merge", "--new_rank", "4"]])
def test_sums_know_what_their_sources_knew(sources, program, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run(capsys, *program, "--save_to", out, "--models", *sources)
    found = metadata_of(out)
    assert json.loads(found["ss_tag_frequency"]) == TAGS
    assert found["modelspec.trigger_phrase"] == "sks cat, fluffy, zz"
    assert found["modelspec.merged_from"] == "a, b"
    run(capsys, *program, "--save_to", out, "--models", *sources, sources[0])
    assert metadata_of(out)["modelspec.merged_from"] == "a, b, a"
    run(capsys, *program, "--save_to", out, "--models", *sources, "--no_metadata")
    assert "ss_tag_frequency" not in metadata_of(out)


def test_sums_by_the_api_too(sources, tmp_path):
    one, two = map(Adapter.load, sources)
    found = metadata_of((one + two).save(tmp_path / "out.safetensors"))
    assert json.loads(found["ss_tag_frequency"]) == TAGS
    assert found["modelspec.trigger_phrase"] == "sks cat, fluffy, zz"
    assert found["modelspec.merged_from"] == "x, y"
    small = metadata_of(two.resize(2).save(tmp_path / "small.safetensors"))
    assert small["modelspec.trigger_phrase"] == "fluffy, zz"
    assert json.loads(small["ss_tag_frequency"]) == {"img": {"cat": 2}, "more": {"car": 5}}


def test_broken_tags_of_others_are_left_alone():
    tags = ["{", "[1]", json.dumps({"a": 3}), json.dumps({"a": {"x": "many", "y": 2}})]
    assert merged_facts([{"ss_tag_frequency": text} for text in tags]) == {"ss_tag_frequency": '{"a": {"y": 2}}'}
    assert merged_facts([{}, {}]) == {}


def test_merged_checkpoints_name_base_and_adapters(sources, tmp_path, capsys):
    base, out = tmp_path / "base.v1.safetensors", tmp_path / "out.safetensors"
    save_file(original("sd1"), base, {"format": "pt", "note": "kept"})
    words = ("merge", "--sd_model", base, "--save_to", out, "--models", *sources)
    run(capsys, *words)
    found = metadata_of(out)
    assert found["modelspec.merged_from"] == "base.v1, a, b"
    assert found["modelspec.trigger_phrase"] == "sks cat, fluffy, zz"
    assert found["note"] == "kept"
    run(capsys, *words, "--no_metadata")
    assert not metadata_of(out)
    run(capsys, "merge", "--sd_model", SD15, "--save_to", tmp_path / "folder", "--models", *sources)
    told = metadata_of(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert told["modelspec.merged_from"] == "sd15, a, b"


def mode(file):
    return stat.S_IMODE(file.stat().st_mode)


def test_who_may_read_a_result_stays_as_it_was(tmp_path, capsys):
    out, folder = tmp_path / "out.safetensors", tmp_path / "folder"
    run(capsys, "merge", "--save_to", out, "--models", LIERLA)
    assert mode(out) & 0o044  # as the umask says
    out.chmod(0o600)
    run(capsys, "merge", "--save_to", out, "--models", LIERLA)
    assert mode(out) == 0o600
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    run(capsys, "merge", "--sd_model", SD15, "--save_to", folder, "--models", LIERLA)
    unet.chmod(0o600)
    folder.chmod(0o700)
    run(capsys, "merge", "--sd_model", folder, "--save_to", folder, "--models", LIERLA)
    assert (mode(unet), mode(folder)) == (0o600, 0o700)
    part = tmp_path / "out-0004.safetensors"
    words = ("split", "--model", SD15 / "dylora.safetensors", "--save_to", out, "--ranks", "4")
    run(capsys, *words)
    part.chmod(0o600)
    run(capsys, *words)
    assert mode(part) == 0o600


@pytest.mark.parametrize("length", [200, 237, 246, 255])
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_names_up_to_the_file_systems_limit(length, ending, tmp_path, capsys):
    cats = "\N{CAT FACE}" * ((length - len(ending)) // 4)  # 4 bytes each
    file = tmp_path / (cats + "x" * (length - len(ending) - len(cats.encode())) + ending)
    assert len(file.name.encode()) == length
    run(capsys, "merge", "--save_to", file, "--models", LIERLA)
    assert Adapter.load(file).modules
    base = tmp_path / "base.safetensors"
    save_file(original("sd1"), base)
    run(capsys, "merge", "--sd_model", base, "--save_to", file, "--models", LIERLA)
    assert sorted(tmp_path.iterdir()) == sorted([file, base])


def test_a_folders_long_name(tmp_path, capsys):
    out = tmp_path / ("m" * 255)
    for _ in range(2):  # anew, and in its place
        run(capsys, "merge", "--sd_model", SD15, "--save_to", out, "--models", LIERLA)
    assert [*tmp_path.iterdir()] == [out]


def test_control_characters_of_foreign_metadata_are_shown_not_done(tmp_path, capsys):
    adapter = Adapter.load(SD15 / "unet_only.safetensors")
    title = "\x1b[2J\x1b]0;owned\x07evil\nfake: line\u202e"
    file = Adapter(adapter.modules, {**adapter.metadata, "modelspec.title": title}).save(tmp_path / "a.safetensors")
    shown = run(capsys, "info", file)
    assert r"modelspec.title: \x1b[2J\x1b]0;owned\x07evil\nfake: line\u202e" in shown
    assert all(one.isprintable() or one == "\n" for one in shown)
    (about,) = json.loads(run(capsys, "info", "--json", file))
    assert about["training"]["modelspec.title"] == title
    name = "lora_unet_\x1b[31mred"
    pair = {f"{name}.lora_down.weight": torch.zeros(2, 8), f"{name}.lora_up.weight": torch.zeros(8, 2)}
    save_file(pair, tmp_path / "b.safetensors")
    assert "\x1b" not in fails(capsys, "merge", "--models", tmp_path / "b.safetensors", "--save_to", tmp_path / "c.pt")


def of_ranks(*ranks):
    start = "mid_block.attentions.0.transformer_blocks.0.attn1"
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    made = {}
    for layer, rank in zip(layers, ranks, strict=False):
        made[ModuleName("unet", f"{start}.{layer}")] = LowRank(torch.ones(rank, 8), torch.ones(8, rank), float(rank))
    return Adapter(made)


def test_ranks_are_told_as_what_they_are(tmp_path, capsys):
    assert rank_range([16, 8, 36, 16]) == "8 to 36"
    adapter = of_ranks(16, 16, 8, 36)
    assert "rank 8 to 36" in repr(adapter)
    assert "rank 16" in repr(of_ranks(16, 16))
    file = adapter.save(tmp_path / "a.safetensors")
    shown = run(capsys, "info", file)
    assert "rank 8 to 36" in shown
    assert "rank 16" not in shown
    assert "rank 8 to 36" in run(capsys, "merge", "--save_to", tmp_path / "b.safetensors", "--models", file)
    run(capsys, "resize", "--model", file, "--save_to", tmp_path / "c.safetensors", "--new_rank", "4")
    assert metadata_of(tmp_path / "c.safetensors")["ss_training_comment"] == "resized from rank 8 to 36"
    assert "| Rank | 8 to 36 (16 in 2 modules, 8 in 1, 36 in 1) |" in str(model_card(adapter, "owner/name"))
    assert "| Rank | 16 |" in str(model_card(of_ranks(16, 16), "owner/name"))
