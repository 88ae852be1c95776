"""Adapters for models that no family describes: read, put together and written under the names of their files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_adapters import cli
from lora_adapters.convert import Adapter, DyLora
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.formats import unlisted

FLAT = "lora_unet_blocks_{}_self_attn_{}"
DOTTED = "diffusion_model.blocks.{}.self_attn.{}"
ENDS = {FLAT: ("lora_down.weight", "lora_up.weight"), DOTTED: ("lora_A.weight", "lora_B.weight")}


def make(path, spelling, seed=0, alpha=None, dtype=torch.float32):
    """A LoRA of rank 4 of a video model's four layers, in kohya's or ComfyUI's names."""
    torch.manual_seed(seed)
    tensors = {}
    for name in (spelling.format(block, layer) for block in (2, 10) for layer in "qv"):
        down, up = ENDS[spelling]
        tensors[f"{name}.{down}"] = torch.randn(4, 12, dtype=dtype)
        tensors[f"{name}.{up}"] = torch.randn(8, 4, dtype=dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path


def changes(path):
    """ΔW of each name in a file, by the arithmetic of the formats."""
    tensors, found = load_file(path), {}
    for spelling in ENDS.values():
        for key in [key for key in tensors if key.endswith(spelling[0])]:
            name = key.removesuffix(f".{spelling[0]}")
            down, up = tensors[key].double(), tensors[f"{name}.{spelling[1]}"].double()
            found[name] = tensors.get(f"{name}.alpha", len(down)) / len(down) * (up @ down)
    return found


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", [FLAT, DOTTED])
@pytest.mark.parametrize("alpha", [None, 2])
def test_is_written_in_its_own_spelling_with_the_same_change(tmp_path, spelling, alpha) -> None:
    path = make(tmp_path / "a.safetensors", spelling, alpha=alpha)
    out = Adapter.load(path, base_model="other").save(tmp_path / "b.safetensors")
    close(changes(out), changes(path))
    ends = {key.partition("self_attn")[2][2:].lstrip(".") for key in load_file(out)}
    assert ends == {*ENDS[spelling], *(["alpha"] if spelling == FLAT else [])}


@pytest.mark.parametrize("spelling", [FLAT, DOTTED])
def test_a_sum_is_the_weighted_sum_of_the_changes(tmp_path, spelling) -> None:
    a, b = make(tmp_path / "a.safetensors", spelling, 1, 2), make(tmp_path / "b.safetensors", spelling, 2)
    out = tmp_path / "sum.safetensors"
    words = ["merge", "--models", a, b, "--ratios", "0.5", "-2", "--base_model", "other", "--save_to", out]
    assert cli.main(list(map(str, words))) == 0
    one, other = changes(a), changes(b)
    close(changes(out), {name: 0.5 * one[name] - 2 * other[name] for name in one})


@pytest.mark.parametrize("command", ["resize", "svd-merge"])
def test_ranks_are_reduced_to_the_best_approximation(tmp_path, command) -> None:
    path, out = make(tmp_path / "a.safetensors", DOTTED, alpha=3), tmp_path / "small.safetensors"
    words = [command, "--model" if command == "resize" else "--models", path, "--new_rank", "2"]
    assert cli.main(list(map(str, [*words, "--base_model", "other", "--save_to", out]))) == 0
    best = {}
    for name, change in changes(path).items():
        left, sizes, right = torch.linalg.svd(change)
        best[name] = left[:, :2] * sizes[:2] @ right[:2]
    close(changes(out), best)


def test_a_dylora_is_split(tmp_path) -> None:
    path = make(tmp_path / "a.safetensors", FLAT, alpha=4)
    Adapter.load(path, base_model="other").as_dylora(DyLora(2, "constant")).save(tmp_path / "dial.safetensors")
    words = ["split", "--model", tmp_path / "dial.safetensors", "--ranks", "2", "--save_to", path]
    assert cli.main(list(map(str, [*words, "--base_model", "other"]))) == 0
    tensors, cut = load_file(tmp_path / "dial.safetensors"), changes(tmp_path / "a-0002.safetensors")
    name = FLAT.format(2, "q")
    expected = tensors[f"{name}.lora_up.weight"][:, :2] @ tensors[f"{name}.lora_down.weight"][:2]
    torch.testing.assert_close(cut[name], expected.double(), rtol=1e-5, atol=1e-5)


def test_other_kinds_of_changes_are_read_and_written(tmp_path) -> None:
    torch.manual_seed(0)
    name = DOTTED.format(0, "q")
    tensors = {f"{name}.lokr_w1": torch.randn(2, 3), f"{name}.lokr_w2": torch.randn(4, 4)}
    tensors |= {f"{DOTTED.format(0, 'k')}.diff": torch.randn(8, 12)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = Adapter.load(tmp_path / "a.safetensors", base_model="other")
    assert adapter.kinds == {"LoKr": 1, "full": 1}
    again = Adapter.load(adapter.scale(0.5).save(tmp_path / "b.safetensors"), base_model="other")
    for module, change in again.modules.items():
        torch.testing.assert_close(change.delta(), 0.5 * adapter.modules[module].delta())


def test_alphas_of_diffusers_metadata_are_read_once(tmp_path) -> None:
    path = make(tmp_path / "a.safetensors", DOTTED)
    tensors = {key.replace("diffusion_model.", "transformer."): tensor for key, tensor in load_file(path).items()}
    facts = {"transformer.peft_type": "LORA", "transformer.r": 4, "transformer.lora_alpha": 8}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(facts)})
    out = Adapter.load(path, base_model="other").save(tmp_path / "b.safetensors")
    close(changes(out), {name: 2 * change for name, change in changes(path).items()})
    with safe_open(out, "pt") as opened:
        assert "lora_adapter_metadata" not in opened.metadata()  # its alpha would be counted twice


def test_embeddings_and_float16_are_kept(tmp_path) -> None:
    path = make(tmp_path / "a.safetensors", DOTTED, alpha=1, dtype=torch.float16)
    save_file({**load_file(path), "bundle_emb.cat.string_to_param.*": torch.ones(1, 3)}, path)
    written = load_file(Adapter.load(path, base_model="other").save(tmp_path / "b.safetensors"))
    assert written["bundle_emb.cat.string_to_param.*"].tolist() == [[1.0] * 3]
    halves = [tensor for key, tensor in written.items() if "lora_" in key]
    assert {tensor.dtype for tensor in halves} == {torch.float16}


def test_what_needs_the_model_is_refused(tmp_path) -> None:
    path = make(tmp_path / "a.safetensors", FLAT)
    adapter = Adapter.load(path, base_model="other")
    with pytest.raises(AdapterError, match="cannot write the format peft, which needs a known model"):
        adapter.save(tmp_path / "folder", format="peft")
    with pytest.raises(AdapterError, match=r"is for another model, but .* is SD1.x"):
        adapter.merge_into("examples/tiny-sd", tmp_path / "merged")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_two_spellings_are_not_put_together(tmp_path, capsys) -> None:
    a, b = make(tmp_path / "a.safetensors", FLAT), make(tmp_path / "b.safetensors", DOTTED)
    words = ["merge", "--models", a, b, "--base_model", "other", "--save_to", tmp_path / "sum.safetensors"]
    assert cli.main(list(map(str, words))) == 1
    assert "spell the layer names differently" in capsys.readouterr().err
    with pytest.raises(AdapterError, match="spell the layer names differently"):
        Adapter.load(a, base_model="other") + Adapter.load(b, base_model="other")


@pytest.mark.parametrize("spelling", [FLAT, DOTTED])
def test_nothing_is_taken_for_another_model_unless_somebody_says_so(tmp_path, spelling) -> None:
    path = make(tmp_path / "a.safetensors", spelling)
    with pytest.raises(AdapterError, match=r"unknown module .*for an unknown model, use --base_model other$"):
        Adapter.load(path)
    tensors = {"lora_unet_mid_block_attentions_0_proj_inn.lora_down.weight": torch.ones(1, 4)}
    with pytest.raises(AdapterError, match="nearest known name") as caught:
        Adapter.from_tensors({**tensors, **{key.replace("down", "up"): torch.ones(4, 1) for key in tensors}})
    assert "--base_model" not in str(caught.value)


def test_info_says_what_there_is(tmp_path, capsys) -> None:
    assert cli.main(["info", str(make(tmp_path / "a.safetensors", FLAT, alpha=2))]) == 0
    said = capsys.readouterr().out
    assert "LoRA for another model" in said
    assert said.index("blocks_02") < said.index("blocks_10")


def test_half_of_a_pair_is_an_error(tmp_path) -> None:
    tensors = load_file(make(tmp_path / "a.safetensors", DOTTED))
    del tensors[f"{DOTTED.format(2, 'q')}.lora_B.weight"]
    with pytest.raises(AdapterError, match=r"blocks\.2\.self_attn\.q"):
        unlisted.read(tensors, {})
