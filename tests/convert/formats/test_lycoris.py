"""Files of other kinds than pairs: read, written as they were, and read by LyCORIS."""

import json
import logging
from copy import deepcopy

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.deltas import DoRA, Full, Hadamard, Norm, WithBias
from lora_adapters.convert.deltas.reduction import weights_only
from tests.convert.checkpoints import GOLDEN

PATHS = {
    "to_q": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "to_k": "mid_block.attentions.0.transformer_blocks.0.attn1.to_k",
    "to_v": "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
    "proj_in": "mid_block.attentions.0.proj_in",
    "norm": "mid_block.attentions.0.norm",
    "out": "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "out2": "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
}
TEXT = "text_model.encoder.layers.0.layer_norm1"


def numbers(*shape):
    return torch.randn(shape)


GROUPS = {
    "to_q": lambda: (
        {name: numbers(6, 6) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
        | {"alpha": torch.tensor(3.0), "scalar": torch.tensor(0.5)}
    ),
    "to_k": lambda: {"lokr_w1": numbers(2, 2), "lokr_w2": numbers(3, 3).half(), "alpha": torch.tensor(1.0)},
    "to_v": lambda: {"lora_down.weight": numbers(2, 6), "lora_up.weight": numbers(6, 2), "dora_scale": numbers(1, 6)},
    "proj_in": lambda: {"diff": numbers(6, 6, 1, 1), "diff_b": numbers(6)},
    "norm": lambda: {"w_norm": numbers(6), "b_norm": numbers(6)},
    "out": lambda: {"weight": numbers(6), "on_input": torch.tensor(True)},
    "out2": lambda: {"oft_blocks": numbers(3, 2, 2), "alpha": torch.tensor([0.25], dtype=torch.float64)},
}


def mixed():
    torch.manual_seed(0)
    tensors = {}
    for name, group in GROUPS.items():
        flat = PATHS[name].replace(".", "_")
        tensors |= {f"lora_unet_{flat}.{end}": tensor for end, tensor in group().items()}
    flat = TEXT.replace(".", "_")
    return tensors | {f"lora_te_{flat}.w_norm": numbers(6)}


def same(tensors, others):
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == others[key].dtype, key
        assert tensor.shape == others[key].shape, key
        assert torch.equal(tensor, others[key]), key


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_file_is_written_as_it_was(ending, tmp_path):
    args = {"rs_lora": "True", "algo": "lokr"}
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)}
    tensors = {**mixed(), "bundle_emb.tok.string_to_param.*": numbers(2, 4)}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert adapter.kinds == {"norm": 2, "LoHa": 1, "LoKr": 1, "DoRA": 1, "full": 1, "IA3": 1, "OFT": 1}
    same(tensors, load_file(adapter.save(tmp_path / "b.safetensors", "lycoris")))
    if ending == "pt":
        same(tensors, torch.load(adapter.save(tmp_path / "b.pt"), weights_only=True))
        return
    with safe_open(adapter.save(tmp_path / "c.safetensors"), "pt") as opened:  # the format of such an adapter
        written = opened.metadata()
    assert json.loads(written["ss_network_args"]) == args
    assert written["ss_network_module"] == "lycoris.kohya"


def test_a_changed_adapter_reads_back_as_the_same_changes(tmp_path):
    metadata = {"ss_network_args": json.dumps({"rs_lora": "True", "algo": "lokr"})}
    adapter = Adapter.from_tensors(mixed(), metadata)
    linear = {module: one for module, one in adapter.modules.items() if not one.needs_base}
    assert len(linear) == 5
    scaled = adapter.with_modules(linear).scale(0.5)
    back = Adapter.load(scaled.save(tmp_path / "a.safetensors"))
    assert "rs_lora" not in back.metadata["ss_network_args"]
    for module, one in linear.items():
        torch.testing.assert_close(back.modules[module].delta(), 0.5 * one.delta())


def test_another_dtype(tmp_path):
    path = Adapter.from_tensors(mixed()).save(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    back = load_file(path)
    assert {key: one.dtype for key, one in back.items() if one.numel() > 1 and one.dtype != torch.bfloat16} == {}
    large = {f"lora_unet_{PATHS['proj_in'].replace('.', '_')}.diff": torch.full((2, 2), 1e6)}
    with pytest.raises(AdapterError, match="proj_in has values that are too large for float16"):
        Adapter.from_tensors(large).save(tmp_path / "b.safetensors", dtype=torch.float16)
    assert not (tmp_path / "b.safetensors").exists()


def test_names_of_sdxl(tmp_path):
    block = "down_blocks.1.attentions.0"
    changes = {
        ModuleName("unet", f"{block}.norm"): Norm(numbers(4), numbers(4)),
        ModuleName("unet", f"{block}.transformer_blocks.0.attn1.to_q"): Full(numbers(4, 4)),
        ModuleName("unet", "down_blocks.1.resnets.0.norm1"): Norm(numbers(4), None),
        ModuleName("unet", "conv_norm_out"): Norm(numbers(4), None),
        ModuleName("text_encoder_2", "text_model.final_layer_norm"): Norm(None, numbers(4)),
    }
    path = Adapter(changes, {"ss_base_model_version": "sdxl_base_v1-0"}).save(tmp_path / "a.safetensors")
    assert set(load_file(path)) == {
        "lora_unet_input_blocks_4_1_norm.w_norm",
        "lora_unet_input_blocks_4_1_norm.b_norm",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.diff",
        "lora_unet_input_blocks_4_0_in_layers_0.w_norm",
        "lora_unet_out_0.w_norm",
        "lora_te2_text_model_final_layer_norm.b_norm",
    }
    back = Adapter.load(path)
    assert back.architecture == "sdxl"
    assert back.modules.keys() == changes.keys()


def test_comfys_names_and_biases_beside_pairs():
    name = "diffusion_model.middle_block.1.proj_in"
    tensors = {f"{name}.lora_down.weight": numbers(2, 6), f"{name}.lora_up.weight": numbers(6, 2)}
    ((module, change),) = Adapter.from_tensors({**tensors, f"{name}.diff_b": numbers(6)}).modules.items()
    assert module == ModuleName("unet", PATHS["proj_in"])
    assert isinstance(change, WithBias)
    assert isinstance(change.change, LowRank)


def test_diffusers_dora_has_the_alpha_of_its_metadata(tmp_path):
    name = f"unet.{PATHS['to_q']}"
    tensors = {f"{name}.lora_A.weight": numbers(2, 6), f"{name}.lora_B.weight": numbers(6, 2)}
    tensors[f"{name}.lora_magnitude_vector"] = numbers(6)
    config = json.dumps({"unet.r": 2, "unet.lora_alpha": 6.0})
    (change,) = Adapter.from_tensors(tensors, {"lora_adapter_metadata": config}).modules.values()
    assert isinstance(change, DoRA)
    assert isinstance(change.change, LowRank)
    assert change.change.alpha == 6
    (change,) = Adapter.from_tensors(tensors).modules.values()
    assert change.change.alpha == 2
    adapter = Adapter.from_tensors(tensors, {"lora_adapter_metadata": config})
    file = adapter.save(tmp_path / "a.safetensors")
    flat = "lora_unet_" + PATHS["to_q"].replace(".", "_")
    assert set(load_file(file)) == {
        f"{flat}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
    }
    (change,) = Adapter.load(file).modules.values()
    assert change.change.alpha == 6


# --- where only pairs will do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "cloneofsimo"])
def test_formats_of_pairs_name_the_module_and_the_kind(format, tmp_path):
    adapter = Adapter.from_tensors(mixed())
    with pytest.raises(AdapterError, match=r"attn1.to_q: a LoHa is not a low-rank pair .* convert --to lora") as caught:
        adapter.save(tmp_path / "a.safetensors", format)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.safetensors").exists()
    with pytest.raises(AdapterError, match="a LoHa is not a low-rank pair"):
        adapter.pairs()
    with pytest.raises(AdapterError, match="a LoHa is not a low-rank pair"):
        adapter.truncate(1)


def test_an_adapter_of_pairs_has_them_all():
    plain = Adapter.load(GOLDEN / "sd15" / "lierla.safetensors")
    assert plain.pairs().keys() == plain.modules.keys()


@pytest.mark.parametrize("raw", ["lora_A.default.weight", "lora_A.my_style.weight", "lora_A.weight"])
def test_peft_s_raw_names_beside_a_magnitude(raw):
    start = f"unet.base_model.model.{PATHS['to_q']}"
    tensors = {f"{start}.{raw}": numbers(2, 6), f"{start}.{raw.replace('_A', '_B')}": numbers(6, 2)}
    magnitude = raw.replace("lora_A", "lora_magnitude_vector")
    adapter = Adapter.from_tensors({**tensors, f"{start}.{magnitude}": numbers(6).abs()})
    assert adapter.kinds == {"DoRA": 1}
    assert adapter.modules[ModuleName("unet", PATHS["to_q"])].change.rank == 2
    twice = {**tensors, f"{start}.{raw.replace('lora_A', 'lora_A.more')}": numbers(2, 6)}
    if raw == "lora_A.default.weight":
        twice = {**tensors, f"{start}.lora_A.more.weight": numbers(2, 6), f"{start}.{magnitude}": numbers(6)}
        with pytest.raises(AdapterError, match="stand for the same tensor"):
            Adapter.from_tensors(twice)


def test_dots_that_diffusers_leaves_in_kohya_s_names():
    flat, dotted = PATHS["to_q"].replace(".", "_"), PATHS["to_q"].replace(".", "_").replace("_to_q", ".to_q")
    tensors = {f"lora_unet_{flat}.lora_down.weight": numbers(2, 6), f"lora_unet_{flat}.lora_up.weight": numbers(6, 2)}
    adapter = Adapter.from_tensors({**tensors, f"lora_unet_{dotted}.lora_magnitude_vector": numbers(6).abs()})
    assert adapter.kinds == {"DoRA": 1}


def test_a_sum_of_kinds_is_exact_and_lazy(tmp_path):
    torch.manual_seed(1)
    module = ModuleName("unet", PATHS["to_q"])
    loha = Hadamard(numbers(6, 2), numbers(2, 6), numbers(6, 2), numbers(2, 6), alpha=1.0)
    pair = LowRank(numbers(2, 6), numbers(6, 2), 1.0)
    total = Adapter({module: loha}) + Adapter({module: pair}).scale(0.5)
    torch.testing.assert_close(total.modules[module].delta(), loha.delta() + 0.5 * pair.delta())
    assert total.kinds == {"LoHa + LoRA": 1}
    with pytest.raises(AdapterError, match=r"attn1.to_q: a sum of LoHa \+ LoRA cannot be written"):
        total.save(tmp_path / "a.safetensors")
    (reduced,) = total.svd(6).pairs().values()
    torch.testing.assert_close(reduced.delta(), total.modules[module].delta(), rtol=1e-4, atol=1e-4)


def test_a_bias_is_not_lost_in_silence():
    module = ModuleName("unet", PATHS["proj_in"])
    pair = LowRank(numbers(2, 6), numbers(6, 2), 1.0)
    for change in (WithBias(pair, numbers(6)), Full(numbers(6, 6), numbers(6))):
        with pytest.raises(AdapterError, match="proj_in: changes the bias too"):
            Adapter({module: change}).svd(2)
        kept, left_out = weights_only({module: change})
        assert left_out == [f"{module}.bias"]
        assert kept[module].bias() is None
        torch.testing.assert_close(kept[module].delta(), change.delta())
    dora = DoRA(WithBias(pair, numbers(6)), 1 + numbers(6, 1).abs())
    kept, left_out = weights_only({module: dora, ModuleName("unet", PATHS["norm"]): Norm(numbers(6))})
    assert left_out == [f"{module}.bias", f"unet.{PATHS['norm']}"]
    assert kept.keys() == {module}
    weight = numbers(6, 6)
    torch.testing.assert_close(kept[module].delta(weight), dora.delta(weight))


# --- LyCORIS itself --------------------------------------------------------------------------------------------------

KINDS = {  # not "full": LyCORIS computes something else with its own files of it
    "loha": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "dora": {"algo": "locon", "dora_wd": True},
    "glora": {"algo": "glora"},
    "norms": {"algo": "locon", "train_norm": True},
}


@torch.no_grad()
def outputs(unet, text_encoder):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator)
    text = text_encoder(torch.arange(9)[None])[0]
    return [text, unet(latents, 7, text).sample]


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_reads_what_is_written(kind, tmp_path):
    """LyCORIS writes a file; it is read and written, as it was and from its changes; LyCORIS reads both."""
    kohya = pytest.importorskip("lycoris.kohya")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    torch.manual_seed(0)
    base = (
        UNet2DConditionModel.from_pretrained(GOLDEN / "sd15" / "unet").eval(),
        CLIPTextModel.from_pretrained(GOLDEN / "sd15" / "text_encoder").eval(),
    )
    adapted = deepcopy(base)
    network = kohya.create_network(1.0, 4, 2.0, None, adapted[1], adapted[0], preset="attn-mlp", **KINDS[kind])
    network.apply_to(adapted[1], adapted[0], True, True)
    network.eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    wanted = outputs(*adapted)

    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert len(adapter.modules) == len(network.unet_loras) + len(network.text_encoder_loras)
    canonical = adapter.map(lambda one: one.scaled(1.0))  # no longer the changes that the file's tensors are kept for
    for number, one in enumerate((adapter, canonical)):
        file = str(one.save(tmp_path / f"{number}.safetensors"))
        again = deepcopy(base)
        if not hasattr(again[1], "text_model"):  # transformers 5, whose names LyCORIS looks for
            tensors = {
                key.replace("lora_te_text_model_", "lora_te_"): tensor for key, tensor in load_file(file).items()
            }
            save_file(tensors, file)
        read, weights = kohya.create_network_from_weights(1.0, file, None, again[1], again[0])
        read.apply_to(again[1], again[0], True, True)
        read.load_state_dict(weights, strict=False)
        read.eval()
        for got, expected, before in zip(outputs(*again), wanted, outputs(*base), strict=True):
            change = float((expected - before).norm())
            assert change > 0.01 * float(before.norm())
            assert float((got - expected).norm()) < 1e-4 * change


LINEAR = {"unet": PATHS["to_q"], "text_encoder": "text_model.encoder.layers.0.mlp.fc1"}
SPELLINGS = {  # a component, and how the name of its module begins
    "model.diffusion_model.": ("unet", False),
    "lora_unet.": ("unet", False),
    "lora_te.": ("text_encoder", False),
    "lora_te1.": ("text_encoder", False),
    "lora_te2.": ("text_encoder_2", False),
    "clip_l.transformer.": ("text_encoder", False),
    "clip_g.transformer.": ("text_encoder_2", False),
    "lycoris_": ("text_encoder", True),
    "lycoris_unet_": ("unet", True),
    "lycoris_te_": ("text_encoder", True),
    "lycoris_te2_": ("text_encoder_2", True),
    "": ("unet", False),
}


@pytest.mark.parametrize("start", SPELLINGS)
def test_how_names_begin(start):
    """Checkpoints', ComfyUI's and OneTrainer's dotted names, a U-Net's own, and LyCORIS' wrapper's."""
    component, flat = SPELLINGS[start]
    path = LINEAR.get(component, LINEAR["text_encoder"])
    name = start + (path.replace(".", "_") if flat else path)
    tensors = {f"{name}.{half}": numbers(6, 6) for half in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    adapter = Adapter.from_tensors(tensors)
    assert list(adapter.modules) == [ModuleName(component, path)]
    if start.startswith(("lora_te1", "lora_te2", "lycoris_te2")):
        assert adapter.architecture == "sdxl"


def test_a_magnitude_without_dimensions_of_its_own():
    """PEFT's vector under LyCORIS' name, as conversions of its files leave it: of output channels."""
    flat = f"lora_unet_{PATHS['to_q'].replace('.', '_')}"
    pair = {f"{flat}.lora_down.weight": numbers(2, 5), f"{flat}.lora_up.weight": numbers(6, 2)}
    vector, weight = numbers(6).abs(), numbers(6, 5)
    (change,) = Adapter.from_tensors({**pair, f"{flat}.dora_scale": vector}).modules.values()
    torch.testing.assert_close((weight + change.delta(weight)).norm(dim=1), vector)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "lora_te2_", "lycoris_te1_"])
def test_flat_names_without_text_model(prefix):
    """As with transformers 5; of LoRA as of the other kinds."""
    name = f"{prefix}encoder_layers_3_self_attn_q_proj"
    pair = {f"{name}.lora_down.weight": torch.ones(1, 2), f"{name}.lora_up.weight": torch.ones(2, 1)}
    for tensors in (pair, {**pair, f"{name}.dora_scale": torch.ones(1, 2)}):
        (module,) = Adapter.from_tensors(tensors).modules
        component = "text_encoder_2" if "te2" in prefix else "text_encoder"
        assert module == ModuleName(component, "text_model.encoder.layers.3.self_attn.q_proj")
