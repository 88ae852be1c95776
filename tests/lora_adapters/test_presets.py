"""Presets: the layers that LyCORIS takes, on the same models, and B-LoRA's blocks of SDXL."""

import re

import pytest
from lycoris.config import PRESET
from lycoris.kohya import LycorisNetworkKohya
from torch import nn

from lora_adapters import LierLaConfig
from lora_adapters.convert.errors import AdapterError
from lora_adapters.presets import PRESETS, chosen, find_preset
from lora_adapters.target_modules import covered
from tests.lora_adapters.conftest import make_pipeline


def names(pipe, preset, norms: bool = False) -> set[str]:
    """The names in kohya's files of all layers that the preset takes in the U-Net and the first text encoder."""
    parts = {"lora_unet": pipe.unet, "lora_te": pipe.text_encoder}
    layers = [(part, layer) for part, model in parts.items() for layer in chosen(model, preset, norms)]
    return {f"{part}_{layer.path}".replace(".", "_") for part, layer in layers}


def lycoris_names(pipe, preset: dict, train_norm: bool = False) -> set[str]:
    """What LyCORIS itself takes.

    Without the class TimestepEmbedding, which it lists for Anima: in a U-Net its layers would have two modules each.
    """
    classes = [name for name in preset.get("unet_target_module", ()) if name != "TimestepEmbedding"]
    preset = {**preset, "unet_target_module": classes}
    network = type("Network", (LycorisNetworkKohya,), {})
    for name in ("unet_target_module", "unet_target_name", "text_encoder_target_module", "text_encoder_target_name"):
        LycorisNetworkKohya.apply_preset({name: preset.get(name, PRESET["full"][name])})
    LycorisNetworkKohya.apply_preset({"module_algo_map": {}, "name_algo_map": {}, "use_fnmatch": False,
                                      "exclude_name": [], "enable_conv": True, **preset})  # fmt: skip
    try:
        made = network(pipe.text_encoder, pipe.unet, warn_on_unmatched=False, train_norm=train_norm)
    finally:
        LycorisNetworkKohya.apply_preset({**PRESET["full"], "use_fnmatch": False, "exclude_name": []})
    return {module.lora_name for module in made.loras}


@pytest.mark.parametrize("size", ["sd15", "sdxl"])
@pytest.mark.parametrize("name", sorted(set(PRESET) - {"attn-only", "ia3"}))
def test_presets_take_what_lycoris_takes(name, size) -> None:
    pipe = make_pipeline(size)
    own = names(pipe, PRESETS[name])
    assert own
    assert own == lycoris_names(pipe, PRESET[name])


def test_norms_are_those_that_lycoris_trains() -> None:
    pipe = make_pipeline("sd15")
    with_norms = names(pipe, PRESETS["full"], norms=True)
    assert with_norms == lycoris_names(pipe, PRESET["full"], train_norm=True)
    assert len(with_norms) > len(names(pipe, PRESETS["full"]))


def test_attention_alone() -> None:
    """LyCORIS looks for the class that kohya's U-Net has; in diffusers' it is called otherwise."""
    pipe = make_pipeline("sd15")
    own = names(pipe, PRESETS["attn-only"])
    assert all(re.search(r"_attn[12]_to_(q|k|v|out_0)$|_self_attn_", name) for name in own)
    assert len([name for name in own if name.startswith("lora_unet")]) == 16 * 8


def test_ia3_takes_keys_values_and_the_feed_forward_s_input() -> None:
    pipe = make_pipeline("sd15")
    layers = list(chosen(pipe.unet, PRESETS["ia3"]))
    assert {layer.path.rpartition(".attn")[2][2:] or layer.path[-8:] for layer in layers} >= {"to_k", "to_v"}
    assert len(layers) == 16 * 5
    assert {layer.path[-8:] for layer in layers if layer.options} == {"ff.net.2"}
    assert {layer.path.rpartition(".")[2] for layer in chosen(pipe.text_encoder, PRESETS["ia3"])} == {
        "k_proj", "v_proj", "fc2",
    }  # fmt: skip


def test_b_lora_takes_two_blocks_of_sdxl_s_u_net() -> None:
    pipe = make_pipeline("sdxl")
    both, content, style = (set(covered(pipe.unet, False, f"b-lora{end}")) for end in ("", "-content", "-style"))
    assert both == content | style
    assert not content & style
    assert {path.split(".transformer")[0] for path in content} == {"up_blocks.0.attentions.0"}
    assert {path.split(".transformer")[0] for path in style} == {"up_blocks.0.attentions.1"}
    depth = len(pipe.unet.up_blocks[0].attentions[0].transformer_blocks)
    assert len(content) == len(style) == 8 * depth
    with pytest.raises(AdapterError, match="UNet2DConditionModel has none of the modules of preset b-lora"):
        covered(make_pipeline("sd15").unet, False, "b-lora")


def test_a_preset_in_a_file(tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'enable_conv = false\nunet_target_module = ["Transformer2DModel", "ResnetBlock2D"]\nunet_target_name = []\n'
        'text_encoder_target_module = ["CLIPMLP"]\nexclude_name = [".*attn2", "mid_block"]\n'
    )
    pipe = make_pipeline("sd15")
    own = names(pipe, find_preset(str(file)))
    preset = {
        "enable_conv": False,
        "unet_target_module": ["Transformer2DModel", "ResnetBlock2D"],
        "unet_target_name": [],
        "text_encoder_target_module": ["CLIPMLP"],
        "exclude_name": [".*attn2", "mid_block"],
    }
    assert own == lycoris_names(pipe, preset)
    assert not any("attn2" in name or "mid_block" in name for name in own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unet_target_modul = []", "unknown key unet_target_modul; the nearest known name is unet_target_module"),
        ("enable_conv = 1", "enable_conv takes true or false"),
        ("unet_target_name = [1]", "unet_target_name takes a list of strings"),
        ("exclude_name = ['(']", "[(] is not a regular expression"),
        ("[module_algo_map]\nX = 1", "module_algo_map takes a table of tables"),
        ("a = ", "cannot be read"),
    ],
)
def test_files_that_are_no_presets(tmp_path, text, message) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(AdapterError, match=f"preset .*mine.toml.*{message}"):
        find_preset(str(file))


def test_names_that_are_no_presets(tmp_path) -> None:
    with pytest.raises(AdapterError, match="unknown preset b-lra; the nearest known name is b-lora"):
        find_preset("b-lra")
    with pytest.raises(AdapterError, match="cannot be read"):
        find_preset(str(tmp_path / "missing.toml"))
    with pytest.raises(
        AdapterError, match="preset ia3 has options for single modules, which LierLaConfig does not support"
    ):
        LierLaConfig(preset="ia3")


def test_an_adapter_with_a_preset() -> None:
    unet = make_pipeline("sd15").unet
    unet.add_adapter(LierLaConfig(r=2, preset="full-lin"), adapter_name="a")
    targets = unet.peft_config["a"].target_modules
    assert targets == set(covered(make_pipeline("sd15").unet, False, "full-lin"))
    assert "down_blocks.0.resnets.0.time_emb_proj" in targets
    assert all(isinstance(unet.get_submodule(path).base_layer, (nn.Linear, nn.Conv2d)) for path in targets)
