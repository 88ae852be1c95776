"""The file tools with changes that are not low-rank pairs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.deltas import BOFT, IA3, OFT, DoRA, Full, GLoRA, Hadamard, Kronecker, Norm, Tucker, WithBias
from lora_adapters.convert.deltas.combined import Combination
from lora_adapters.convert.families.names import bias_of
from lora_adapters.convert.models.merging import merge_into_model
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.tools.combining import put_together
from tests.convert.checkpoints import original
from tests.convert.scripts import SD15, delta_distance, fails, run

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0"
RESNET = "mid_block.resnets.0.conv1"
OPEN_CLIP_BIAS = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"


def numbers(*shape):
    return 0.1 * torch.randn(shape)


def factors(rows, columns):
    return numbers(rows, 2), numbers(2, columns)


def pair(rows, columns):
    up, down = factors(rows, columns)
    return LowRank(down, up, 1.0)


def loha(rows, columns):
    return Hadamard(*factors(rows, columns), *factors(rows, columns), alpha=1.0)


def glora(rows, columns):
    return GLoRA(*factors(columns, columns), *factors(rows, columns), alpha=1.0)


def tucker(rows, columns, height, width):
    return Tucker(numbers(2, columns, 1, 1), numbers(2, 2, height, width), numbers(rows, 2, 1, 1), 1.0)


def changes(checkpoint):
    """A change of each kind for layers of a checkpoint."""
    torch.manual_seed(0)
    known = checkpoint.parameters

    def shape(component, path):
        module = ModuleName(component, path)
        return tuple(checkpoint.weight(module, known[module]).shape)

    def norm(component, path, bias=True):
        return Norm(numbers(*shape(component, path)), numbers(*shape(component, path)) if bias else None)

    rows, columns = shape("unet", f"{ATTENTION}.to_q")
    width = shape("text_encoder", f"{TEXT}.self_attn.q_proj")[0]
    unet = {
        f"{ATTENTION}.to_q": loha(rows, columns),
        f"{ATTENTION}.to_k": Kronecker(w1=numbers(2, 2), w2=numbers(rows // 2, columns // 2), alpha=1.0),
        f"{ATTENTION}.to_v": DoRA(pair(rows, columns), 1 + numbers(1, columns)),
        f"{ATTENTION}.to_out.0": WithBias(pair(rows, columns), numbers(rows)),
        RESNET: tucker(*shape("unet", RESNET)),
        "conv_norm_out": norm("unet", "conv_norm_out"),
        "mid_block.attentions.0.norm": norm("unet", "mid_block.attentions.0.norm", bias=False),
    }
    text = {
        f"{TEXT}.self_attn.q_proj": Full(numbers(width, width), numbers(width)),
        f"{TEXT}.self_attn.k_proj": Full(None, numbers(width)),
        f"{TEXT}.self_attn.v_proj": IA3(numbers(width), on_input=False),
        f"{TEXT}.self_attn.out_proj": OFT(numbers(width // 4, 4, 4)),
        f"{TEXT}.mlp.fc1": BOFT(numbers(2, shape("text_encoder", f"{TEXT}.mlp.fc1")[0] // 4, 4, 4)),
        f"{TEXT}.mlp.fc2": glora(*shape("text_encoder", f"{TEXT}.mlp.fc2")),
        f"{TEXT}.layer_norm1": norm("text_encoder", f"{TEXT}.layer_norm1"),
        "text_model.final_layer_norm": norm("text_encoder", "text_model.final_layer_norm", bias=False),
    }
    second = {}
    if checkpoint.architecture == "sdxl":
        width = shape("text_encoder_2", f"{TEXT}.self_attn.k_proj")[0]
        second[f"{TEXT}.self_attn.k_proj"] = Full(numbers(width, width), numbers(width))
        second[f"{TEXT}.layer_norm2"] = norm("text_encoder_2", f"{TEXT}.layer_norm2")
    parts = {"unet": unet, "text_encoder": text, "text_encoder_2": second}
    return {ModuleName(part, path): change for part, made in parts.items() for path, change in made.items()}


@pytest.fixture
def sd1(tmp_path):
    """A checkpoint of SD1.x, and a file with a change of each kind for it."""
    save_file(original("sd1"), tmp_path / "model.safetensors")
    adapter = Adapter(changes(Checkpoint.open(tmp_path / "model.safetensors")))
    return tmp_path / "model.safetensors", adapter.save(tmp_path / "kinds.safetensors")


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_kind_is_merged_into_a_checkpoint(kind, tmp_path, capsys):
    file, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    tensors = original(kind)
    if kind == "sd2":
        tensors["cond_stage_model.model.ln_final.weight"] = torch.ones(len(tensors[OPEN_CLIP_BIAS]) // 3)
    save_file(tensors, file)
    source = Checkpoint.open(file)
    adapter = Adapter(changes(source), {"ss_base_model_version": source.base_version})
    path = adapter.save(tmp_path / "kinds.safetensors")
    run(capsys, "merge", "--sd_model", file, "--save_to", out, "--models", path, "--ratios", "0.7")
    merged = Checkpoint.open(out)
    old, new = source.parameters, merged.parameters
    touched = set()
    for module, change in adapter.modules.items():
        scaled, weight = change.scaled(0.7), source.weight(module, old[module])
        wanted = weight + scaled.delta(weight)
        torch.testing.assert_close(merged.weight(module, new[module]), wanted, rtol=1e-5, atol=1e-6)
        touched.add(old[module].slice_of(module).key)
        if (difference := scaled.bias()) is not None:
            bias = bias_of(module)
            wanted = source.weight(bias, old[bias]) + difference
            torch.testing.assert_close(merged.weight(bias, new[bias]), wanted, rtol=1e-5, atol=1e-6)
            touched.add(old[bias].slice_of(bias).key)
    before, after = load_file(file), load_file(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - touched)
    bias_alone = ModuleName("text_encoder", f"{TEXT}.self_attn.k_proj")
    assert torch.equal(merged.weight(bias_alone), source.weight(bias_alone))


def test_a_weight_of_nothing_is_no_change(sd1, tmp_path, capsys):
    (file, path), out = sd1, tmp_path / "out.safetensors"
    none = "[" + ",".join(["0"] * 26) + "]"
    for words in (("--ratios", "0"), ("--ratios", "1", "--lbws", none)):
        run(capsys, "merge", "--sd_model", file, "--save_to", out, "--models", path, *words)
        before, after = load_file(file), load_file(out)
        if "--lbws" in words:  # lists of weights have no place for layers outside of the blocks
            before = {key: tensor for key, tensor in before.items() if ".out.0." not in key}
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


MISFITS = {
    "no bias there": ({f"{ATTENTION}.to_q": Full(None, torch.ones(32))}, "to_q.bias, which"),
    "a norm of another size": ({"conv_norm_out": Norm(torch.ones(3), None)}, "conv_norm_out"),
    "a bias of another size": ({f"{ATTENTION}.to_out.0": Full(None, torch.ones(3))}, "to_out.0"),
    "NaN": ({"conv_norm_out": Norm(torch.full((8,), torch.nan), None)}, "NaN or infinite"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(name, sd1, tmp_path, capsys):
    modules, said = MISFITS[name]
    out = tmp_path / "out.safetensors"
    path = Adapter({ModuleName("unet", path): change for path, change in modules.items()}).save(tmp_path / "a.pt")
    assert said in fails(capsys, "merge", "--sd_model", sd1[0], "--save_to", out, "--models", path)
    assert not out.exists()


# --- pairs of other kinds --------------------------------------------------------------------------------------------


@pytest.fixture
def linear(tmp_path):
    """An adapter of kinds that do not depend on the model's weights, and its file."""
    torch.manual_seed(1)
    modules = {
        f"{ATTENTION}.to_q": loha(8, 6),
        RESNET: loha(8, 36),  # a flat kernel of 3x3
        f"{ATTENTION}.to_k": LowRank(numbers(3, 6), numbers(8, 3), 1.0),
        f"{ATTENTION}.to_out.0": WithBias(Full(numbers(8, 8)), numbers(8)),
    }
    adapter = Adapter({ModuleName("unet", path): change for path, change in modules.items()})
    return adapter, adapter.save(tmp_path / "linear.safetensors")


def distance(adapter, made):
    """The largest difference of any number of the changes; kernels may be flat."""
    assert adapter.modules.keys() == made.modules.keys()
    return max(
        float((one.delta().flatten() - made.modules[module].delta().flatten()).abs().max())
        for module, one in adapter.modules.items()
    )


def test_convert_to_lora(linear, tmp_path, capsys):
    (adapter, path), out = linear, tmp_path / "out.safetensors"
    said = run(capsys, "convert", "--model", path, "--save_to", out, "--to", "lora", "--rank", "8")
    assert "1 modules left out, which low-rank pairs cannot represent" in said
    assert "to_out.0.bias" in said
    assert "relative error" in said
    made = Adapter.load(out)
    assert made.kinds == {"LoRA": 4}
    assert distance(adapter, made) < 1e-5, "the ranks are at most 8"
    assert made.pairs()[ModuleName("unet", RESNET)].kernel == (3, 3)
    assert made.metadata["ss_network_module"] == "networks.lora"
    kept = made.pairs()[ModuleName("unet", f"{ATTENTION}.to_k")]
    assert (kept.rank, kept.alpha) == (3, 1.0), "a pair of a lower rank stays"

    run(capsys, "convert", "--model", path, "--save_to", out, "--to", "lora", "--rank", "2", "--conv_rank", "1")
    ranks = {module.path: pair.rank for module, pair in Adapter.load(out).pairs().items()}
    assert ranks == {f"{ATTENTION}.to_q": 2, RESNET: 1, f"{ATTENTION}.to_k": 2, f"{ATTENTION}.to_out.0": 2}
    words = ("--to", "lora", "--rank", "2", "--format", "peft")
    run(capsys, "convert", "--model", path, "--save_to", tmp_path / "peft", *words)
    assert Adapter.load(tmp_path / "peft").kinds == {"LoRA": 4}


def test_resize_and_svd_merge(linear, tmp_path, capsys):
    (adapter, path), out = linear, tmp_path / "out.safetensors"
    assert "to_out.0.bias" in run(capsys, "resize", "--model", path, "--save_to", out, "--new_rank", "8")
    assert distance(adapter, Adapter.load(out)) < 1e-5
    twice = ("--models", path, path, "--ratios", "0.5", "0.25", "--save_to", out)
    for words in (("svd-merge", *twice, "--new_rank", "8"), ("merge", *twice, "--new_rank", "8")):
        assert "relative error" in run(capsys, *words)
        assert distance(adapter.scale(0.75), Adapter.load(out)) < 1e-5
    out.unlink()
    assert "a sum of full cannot be written" in fails(capsys, "merge", *twice)
    assert not out.exists()
    run(capsys, "merge", "--models", f"{path}:0.5", "--save_to", out)
    assert Adapter.load(out).kinds == adapter.kinds, "one alone stays of its kind"
    assert distance(adapter.scale(0.5), Adapter.load(out)) < 1e-6


def test_a_change_that_depends_on_the_weights_is_one_line(tmp_path, capsys):
    adapter = Adapter({ModuleName("unet", f"{ATTENTION}.to_q"): DoRA(pair(8, 6), 1 + numbers(8, 1))})
    path, out = adapter.save(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    for words in (
        ("convert", "--model", path, "--to", "lora", "--rank", "2"),
        ("resize", "--model", path, "--new_rank", "2"),
        ("svd-merge", "--models", path, path, "--new_rank", "2"),
    ):
        said = fails(capsys, *words, "--save_to", out)
        assert "to_q: the change of a DoRA module depends on the model's weight" in said
        assert not out.exists()


def test_convert_to_lora_with_the_models_weights(sd1, tmp_path, capsys):
    (file, path), out = sd1, tmp_path / "out.safetensors"
    said = run(capsys, "convert", "--model", path, "--save_to", out, "--to", "lora", "--rank", "64", "--sd_model", file)
    assert "relative error" in said
    adapter, made, model = Adapter.load(path), Adapter.load(out).pairs(), Checkpoint.open(file)
    wanted = {module for module, one in adapter.modules.items() if one.changes_weight and one.kind != "norm"}
    assert made.keys() == wanted
    for module in wanted:
        weight = model.weight(module)
        change = adapter.modules[module].delta(weight)
        assert float((made[module].delta(weight) - change).norm()) < 1e-4 * float(change.norm()), module


def test_options_of_convert(linear, tmp_path, capsys):
    (_, path), out = linear, tmp_path / "out.safetensors"
    words = ("convert", "--model", path, "--save_to", out)
    assert "needs --rank" in fails(capsys, *words, "--to", "lora", status=2)
    assert "require --to lora" in fails(capsys, *words, "--rank", "4", "--format", "kohya", status=2)
    assert "require --to lora" in fails(capsys, *words, "--sd_model", path, "--format", "kohya", status=2)
    assert "--format is needed" in fails(capsys, *words, status=2)
    assert "convert --to lora" in fails(capsys, *words, "--format", "kohya")
    run(capsys, *words, "--format", "lycoris")
    assert load_file(path).keys() == load_file(out).keys()
    plain = SD15 / "lierla.safetensors"
    run(capsys, "convert", "--model", plain, "--save_to", out, "--to", "lora", "--rank", "64")
    assert delta_distance(Adapter.load(plain), Adapter.load(out)) == 0, "its rank is low enough"


def test_info_names_the_kind_of_each_block(sd1, capsys):
    _, path = sd1
    assert "norm in 4, LoRA in 2, full in 2, BOFT in 1, DoRA in 1" in run(capsys, "info", path)
    (about,) = json.loads(run(capsys, "info", "--json", path))
    assert about["kinds"]["GLoRA"] == 1
    blocks = {row["block"]: row for row in about["blocks"]}
    assert blocks["MID"]["kinds"] == {"DoRA": 1, "LoHa": 1, "LoKr": 1, "LoRA": 2, "norm": 1}
    assert blocks["MID"]["norm"] is None
    assert blocks["MID"]["depends_on_weights"] is True
    norm = Adapter.load(path).modules[ModuleName("unet", "conv_norm_out")]
    assert blocks["unet"]["norm"] == pytest.approx(float(norm.delta().norm()), rel=1e-5)
    stored = sum(one.numel() for key, one in load_file(path).items() if not key.endswith(("alpha", "on_input")))
    assert about["parameters"] == stored


def test_skip_unknown_leaves_out_modules_of_other_kinds(sd1, tmp_path, capsys):
    (file, path), out = sd1, tmp_path / "out.safetensors"
    strange = {"lora_unet_strange.hada_w1_a": numbers(2, 2), "lora_unet_strange_norm.w_norm": numbers(2)}
    tensors = load_file(path)
    save_file({**tensors, **strange}, path)
    words = ("merge", "--sd_model", file, "--save_to", out, "--models", path)
    assert "unknown module lora_unet_strange" in fails(capsys, *words)
    said = run(capsys, *words, "--skip_unknown")
    assert "2 modules left out" in said
    assert "lora_unet_strange_norm" in said


@pytest.mark.parametrize("how", ["merge", "a sum", "ties", "beside a change of the bias"])
@pytest.mark.parametrize("path", [f"{ATTENTION}.to_q", "mid_block.attentions.0.proj_in"], ids=["plain", "biased"])
def test_factors_that_scale_biases_too(path, how, tmp_path):
    """PEFT's IA3 of output channels, in a layer without a bias and in one with."""
    save_file(original("sd1"), tmp_path / "model.safetensors")
    checkpoint, module = Checkpoint.open(tmp_path / "model.safetensors"), ModuleName("unet", path)
    known = checkpoint.parameters
    weight = checkpoint.weight(module, known[module]).float()
    factors, more = 1 + numbers(len(weight), 1), numbers(len(weight))
    beside = how == "beside a change of the bias"
    change = WithBias(IA3.of_peft(factors).scaled(0.5), more, 3.0) if beside else IA3.of_peft(factors)
    adapters, weights = {"a": Adapter({module: change})}, [0.7]
    if how == "a sum":
        adapters, weights = adapters | {"b": adapters["a"]}, [0.3, 0.4]
    if how == "ties":
        adapters, weights = {"a": put_together(adapters, weights, Combination("ties", 1.0))}, [1.0]
    given = checkpoint, tmp_path / "out.safetensors", [*adapters.values()], weights
    bias = bias_of(module)
    if beside and bias not in known:
        with pytest.raises(AdapterError, match=f"changes {bias}, which .* does not have"):
            merge_into_model(*given)
        return
    done = Checkpoint.open(merge_into_model(*given))
    scale = (factors.flatten() - 1) * (0.35 if beside else 0.7)
    found = done.weight(module, done.parameters[module]).float()
    torch.testing.assert_close(found, weight * (1 + scale).reshape(-1, *[1] * (weight.ndim - 1)))
    if bias in known:
        expected = checkpoint.weight(bias, known[bias]).float() * (1 + scale) + (2.1 * more if beside else 0)
        torch.testing.assert_close(done.weight(bias, done.parameters[bias]).float(), expected)


@pytest.mark.parametrize("command", ["convert", "resize", "svd-merge"])
def test_pairs_of_kinds_that_depend_on_the_models_weights(command, tmp_path, capsys):
    """Of full rank, from the model's weights, they are the change itself; what they cannot hold is said."""
    save_file(original("sd1"), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    known = checkpoint.parameters
    query, key = (ModuleName("unet", f"{ATTENTION}.{name}") for name in ("to_q", "to_k"))
    biased = ModuleName("unet", "mid_block.attentions.0.proj_in")
    weights = {module: checkpoint.weight(module, known[module]).float() for module in (query, key, biased)}
    made = {
        query: DoRA(pair(*weights[query].shape), 1 + numbers(len(weights[query]), 1).abs()),
        key: IA3.of_peft(1 + numbers(len(weights[key]), 1)),
        biased: IA3.of_peft(1 + numbers(len(weights[biased]), 1)),
    }
    out = tmp_path / "out.safetensors"
    words = [
        command,
        "--models" if command == "svd-merge" else "--model",
        Adapter(made).save(tmp_path / "a.safetensors"),
    ]
    words += ["--save_to", out, *(["--to", "lora", "--rank"] if command == "convert" else ["--new_rank"]), 64]
    assert "depends on the model's weight" in fails(capsys, *words)
    assert not out.exists()
    said = run(capsys, *words, "--sd_model", checkpoint.path)
    assert f"1 modules left out, which low-rank pairs cannot represent:\n  {biased}.bias\n" in said
    pairs = Adapter.load(out).modules
    for module, change in made.items():
        wanted = change.delta(weights[module])
        torch.testing.assert_close(pairs[module].delta(weights[module]), wanted, rtol=1e-4, atol=1e-5)
