"""`load_lora_adapter` of a model, and what pipelines load into one model: changes that diffusers has no reader for."""

import pytest
import torch
from safetensors.torch import save_file

from lora_adapters import AdapterError, injection
from lora_adapters.convert.deltas import read_module
from lora_adapters.convert.families.names import ModuleName

from .test_lycoris_pipeline import base_of, random_change

QUERY = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = ModuleName("unet", "mid_block.resnets.0.conv1")
TEXT = ModuleName("text_encoder", "text_model.encoder.layers.0.mlp.fc1")


def spelled(changes, spelling):
    """The tensors of changes as a state dict: under kohya's names, diffusers' with and without the component."""
    flat = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    found = {}
    for module, change in changes.items():
        start = {"kohya": flat[module.component] + module.path.replace(".", "_"), "dotted": str(module)}
        found |= {f"{start.get(spelling, module.path)}.{end}": one for end, one in change.tensors().items()}
    return found


def of_unet(pipe, kind):
    torch.manual_seed(1)
    modules = (QUERY,) if kind == "OFT" else (QUERY, CONV)
    linear = random_change(kind, base_of(pipe, QUERY))
    if kind == "full":
        linear = read_module({"diff": 0.3 * torch.randn(base_of(pipe, QUERY).weight.shape)})
    conv = read_module({"diff": 0.3 * torch.randn(base_of(pipe, CONV).weight.shape)})
    return {module: linear if module == QUERY else conv for module in modules}


def layer_of(pipe, module):
    model = getattr(pipe, module.component)
    return model.get_submodule(injection.live_path(model, module.path))


def loaded_as(pipe, changes, load):
    """Whether the fused weights are those with the changes, after a load; and those of before without it."""
    before = {module: base_of(pipe, module).weight.detach().clone() for module in changes}
    load(pipe)
    for module, change in changes.items():
        layer_of(pipe, module).merge()
        change = change.delta(before[module]).reshape(before[module].shape)
        found = base_of(pipe, module).weight - before[module]
        assert float((found - change).norm()) < 1e-5 * float(change.norm())
        layer_of(pipe, module).unmerge()
    adapted = [layer for part in (pipe.unet, pipe.text_encoder) for layer in part.modules() if hasattr(layer, "merge")]
    assert len(adapted) == len(changes)
    pipe.unload_lora_weights()
    assert all(layer_of(pipe, module) is base_of(pipe, module) for module in changes)


@pytest.mark.parametrize("spelling", ["kohya", "dotted", "plain"])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "DoRA", "full", "OFT"])
def test_a_state_dict_of_any_kind(kind, spelling, pipeline):
    pipe = pipeline()
    changes = of_unet(pipe, kind)
    prefix = None if spelling == "plain" else "unet"
    loaded_as(pipe, changes, lambda pipe: pipe.unet.load_lora_adapter(spelled(changes, spelling), prefix=prefix))


@pytest.mark.parametrize("alpha", [None, 0.5, 2.0])
def test_lokr_of_linear_layers(alpha, pipeline):
    """Diffusers itself reads these, but for their alphas."""
    pipe = pipeline()
    tensors = random_change("LoKr", base_of(pipe, QUERY)).tensors()
    del tensors["alpha"]
    change = read_module(tensors if alpha is None else {**tensors, "alpha": torch.tensor(alpha)})
    changes = {QUERY: change}
    state = {key: one for key, one in spelled(changes, "dotted").items() if alpha is not None or "alpha" not in key}
    loaded_as(pipe, changes, lambda pipe: pipe.unet.load_lora_adapter(state, prefix="unet"))


def test_kohya_s_names_of_a_plain_lora(pipeline):
    pipe = pipeline()
    changes = {QUERY: random_change("LoRA", base_of(pipe, QUERY))}
    loaded_as(pipe, changes, lambda pipe: pipe.unet.load_lora_adapter(spelled(changes, "kohya"), prefix=None))


@pytest.mark.parametrize("spelling", ["kohya", "dotted"])
def test_a_file(spelling, pipeline, tmp_path):
    pipe = pipeline()
    changes = of_unet(pipe, "LoHa")
    save_file(spelled(changes, spelling), tmp_path / "loha.safetensors")
    name = {"weight_name": "loha.safetensors", "prefix": "unet"}
    loaded_as(pipe, changes, lambda pipe: pipe.unet.load_lora_adapter(str(tmp_path), **name))


@pytest.mark.parametrize("spelling", ["kohya", "dotted"])
def test_the_parts_of_a_pipeline_s_state_dict(spelling, pipeline):
    pipe = pipeline()
    changes = {**of_unet(pipe, "LoHa"), TEXT: random_change("LoKr", base_of(pipe, TEXT))}
    tensors = spelled(changes, spelling)

    def load(pipe):
        pipe.load_lora_into_unet(tensors, network_alphas=None, unet=pipe.unet, adapter_name="a")
        pipe.load_lora_into_text_encoder(tensors, None, pipe.text_encoder, adapter_name="a")

    loaded_as(pipe, changes, load)


def test_alphas_beside_the_tensors(pipeline):
    pipe = pipeline()
    change = random_change("LoHa", base_of(pipe, QUERY))
    tensors = {key: one for key, one in spelled({QUERY: change}, "dotted").items() if not key.endswith("alpha")}
    halved = {QUERY: read_module({**change.tensors(), "alpha": torch.tensor(1.0)})}
    alphas = {f"{QUERY}.alpha": 1.0}
    loaded_as(pipe, halved, lambda pipe: pipe.load_lora_into_unet(tensors, network_alphas=alphas, unet=pipe.unet))


def test_a_fault_is_one_line_and_changes_nothing(pipeline):
    pipe = pipeline()
    tensors = spelled(of_unet(pipe, "LoHa"), "dotted")
    del tensors[f"{QUERY}.hada_w2_b"]
    with pytest.raises(AdapterError, match=r"to_q: .*hada_w2_b") as caught:
        pipe.unet.load_lora_adapter(tensors, prefix="unet")
    assert "\n" not in str(caught.value)
    assert not getattr(pipe.unet, "peft_config", {})


def test_what_diffusers_reads_is_left_to_it(pipeline):
    pipe = pipeline()
    pair = random_change("LoRA", base_of(pipe, QUERY))
    tensors = {f"{QUERY.path}.lora_A.weight": pair.down, f"{QUERY.path}.lora_B.weight": pair.up}
    pipe.unet.load_lora_adapter(tensors, prefix="unet")  # nothing is behind the prefix, as diffusers' log says
    assert not getattr(pipe.unet, "peft_config", {})
    pipe.unet.load_lora_adapter(tensors, prefix=None)
    assert pipe.unet.peft_config["default_0"].r == pair.rank
