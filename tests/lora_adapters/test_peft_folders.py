"""Folders that PEFT itself writes, of other kinds than LoRA, in a pipeline: as PEFT's own layers compute them."""

import copy
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters import Adapter, AdapterError

from .conftest import expected
from .golden_outputs import error, outputs

TARGETS = {"target_modules": ["to_q", "to_v", "ff.net.2"]}
WITH_CONV = {"target_modules": ["to_q", "conv1", "proj_in"]}
FACTORS = {"IA3": ["ff.net.2"], "IA3, of biases too": [], "IA3, of inputs": TARGETS["target_modules"]}
CONFIGS = {
    "LoHa": lambda: peft.LoHaConfig(r=3, alpha=5, rank_pattern={"to_v": 2}, alpha_pattern={"to_q": 2}, **TARGETS),
    "LoHa, convolutions": lambda: peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, **WITH_CONV),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_both=True, decompose_factor=4, **TARGETS),
    "LoKr, full": lambda: peft.LoKrConfig(r=32, alpha=8, **TARGETS),
    "LoKr, convolutions": lambda: peft.LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, **WITH_CONV),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=True, **TARGETS),
    "OFT, exact and shared": lambda: peft.OFTConfig(
        oft_block_size=4, use_cayley_neumann=False, block_share=True, **TARGETS
    ),
    "OFT, three terms": lambda: peft.OFTConfig(
        oft_block_size=8, use_cayley_neumann=True, num_cayley_neumann_terms=3, **TARGETS
    ),
    "OFT, constrained": lambda: peft.OFTConfig(oft_block_size=8, coft=True, eps=0.5, **TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **TARGETS),
    "BOFT, convolutions": lambda: peft.BOFTConfig(boft_block_size=4, **WITH_CONV),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], target_modules=["to_q", "to_v"]),
    "IA3, of biases too": lambda: peft.IA3Config(feedforward_modules=[], **WITH_CONV),
    "IA3, of inputs": lambda: peft.IA3Config(feedforward_modules=WITH_CONV["target_modules"], **WITH_CONV),
    "DoRA": lambda: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, alpha_pattern={"to_q": 7}, **TARGETS),
    "rsLoRA": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, **TARGETS),
}


def saved(pipe, config, folder):
    """PEFT's model of the U-Net with random weights, saved; the outputs with it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(pipe.unet), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_A", "lora_B", "hada_", "lokr_", "oft_R", "ia3_l")):
                parameter.normal_(std=0.2)
            elif "magnitude" in name or "boft_s" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    model.save_pretrained(folder / "unet")
    other = copy.copy(pipe)
    other.unet = model.eval()
    return outputs(other, expected("sd15"))


@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft_computes_it(name, pipeline, tmp_path):
    pipe = pipeline()
    base = outputs(pipe, expected("sd15"))
    want = saved(pipe, CONFIGS[name](), tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    assert error(outputs(pipe, expected("sd15")), want, base) < 1e-4
    pipe.fuse_lora()
    assert error(outputs(pipe, expected("sd15")), want, base) < 1e-4
    kind = name.split(",")[0].replace("rs", "")
    assert Adapter.load(tmp_path).kinds.keys() == {kind}


def test_what_is_not_read_is_one_line(pipeline, tmp_path):
    pipe = pipeline()
    saved(pipe, peft.OFTConfig(oft_block_size=8, **TARGETS), tmp_path)
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    with pytest.raises(AdapterError, match="which LyCORIS files cannot store"):
        Adapter.from_pipeline(pipe, "a").save(tmp_path / "a.safetensors")
    pipe.unload_lora_weights()
    file = tmp_path / "unet" / "adapter_config.json"
    config = json.loads(file.read_text())
    shutil.rmtree(tmp_path / "unet")
    saved(pipe, peft.IA3Config(feedforward_modules=[], **TARGETS), tmp_path)
    for changes, said in (
        ({"peft_type": "VERA"}, "peft_type VERA is not supported"),
        ({"bias": "all"}, "trained with bias=all"),
        ({"peft_type": "LOHA"}, "invalid alpha 8 or rank 0"),
    ):
        file.write_text(json.dumps(config | changes))
        with pytest.raises(AdapterError, match=said) as caught:
            pipe.load_lora_weights(tmp_path)
        assert "\n" not in str(caught.value)
        assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("spelling", ["unet.{}", "unet.base_model.model.{}", "diffusion_model.{}"])
def test_raw_factors_in_one_file(name, spelling, pipeline, tmp_path):
    """As a state dict has them, with the adapter's name; a linear layer's shape says which side they are of."""
    pipe = pipeline()
    base = outputs(pipe, expected("sd15"))
    want = saved(pipe, peft.IA3Config(feedforward_modules=FACTORS[name], **TARGETS), tmp_path)
    raw = load_file(tmp_path / "unet" / "adapter_model.safetensors")
    paths = {key: key.removeprefix("base_model.model.").replace(".ia3_l", ".ia3_l.default") for key in raw}
    save_file({spelling.format(paths[key]): tensor for key, tensor in raw.items()}, tmp_path / "a.safetensors")
    pipe.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    assert error(outputs(pipe, expected("sd15")), want, base) < 1e-4
    again = Adapter.from_pipeline(pipe, "a").save(tmp_path / "b.safetensors")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(again)
    assert error(outputs(pipe, expected("sd15")), want, base) < 1e-4
