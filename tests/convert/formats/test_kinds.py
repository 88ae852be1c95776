"""Files of other kinds: one line that names the file, the kind and a key, from every reader."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.errors import UnknownFormatError
from lora_adapters.convert.info import main as info
from lora_adapters.convert.tools.inputs import load
from lora_adapters.convert.tools.merge import weighted_sum

NAME = "lora_unet_mid_block_attentions_0_proj_in"
PATH = "unet.mid_block.attentions.0.proj_in"
PAIR = {f"{NAME}.lora_down.weight": torch.ones(1, 2), f"{NAME}.lora_up.weight": torch.ones(2, 1)}
KINDS = {
    "a LoHa adapter": [f"{NAME}.{part}" for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")],
    "a T-LoRA adapter": [f"{NAME}.{part}" for part in ("q_layer.weight", "p_layer.weight", "lambda_layer", "alpha")],
    "a LoHa": [f"{NAME}.hada_t1"],
    "a LoKr adapter": [f"{NAME}.lokr_w1"],
    "a LoKr": ["lycoris_mid_block_attentions_0_proj_in.lokr_w1_a"],
    "an OFT adapter": [f"{NAME}.oft_blocks", f"{NAME}.alpha"],
    "an OFT": [f"{PATH}.oft_R.weight"],
    "a GLoRA adapter": [f"{NAME}.a1.weight", f"{NAME}.b1.weight"],
    r"an \(IA\)3 adapter": [f"{NAME}.weight", f"{NAME}.on_input"],
    "an adapter with weights of norm layers": [*PAIR, f"{NAME}.w_norm", f"{NAME}.b_norm"],
    "an adapter with full differences of weights": [f"{NAME}.diff", f"{NAME}.diff_b"],
    "a LoCon adapter with a trained scalar": [*PAIR, f"{NAME}.scalar"],
    "a DoRA adapter": [*PAIR, f"{NAME}.dora_scale"],
    "a DoRA": [f"{PATH}.lora_A.weight", f"{PATH}.lora_B.weight", f"{PATH}.lora_magnitude_vector"],
    "a LoRA with biases": [f"{PATH}.lora_A.weight", f"{PATH}.lora_B.weight", f"{PATH}.lora_B.bias"],
    r"a Control LoRA of Flux\.1, .*for diffusers' FluxControlPipeline": [
        *(f"double_blocks.0.img_attn.proj.lora_{part}" for part in ("A.weight", "B.weight", "B.bias")),
        "double_blocks.0.img_attn.norm.key_norm.scale",
    ],
    r"a Control LoRA of Flux\.1": [
        *(f"single_blocks.0.linear2.lora_{part}.weight" for part in "AB"),
        "single_blocks.0.norm.query_norm.scale",
    ],
    "a Control-LoRA": ["input_blocks.0.0.weight", "lora_controlnet"],
    "an adapter for Stable Cascade": ["lora_prior_unet_down_blocks_0_attentions_0.lora_down.weight"],
    "an adapter for a model with transformers": ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    "an adapter for a model with": [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "transformer.transformer_blocks.0.attn1.to_k.lora_A.weight",
    ],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    r"an embedding \(textual inversion\)": ["clip_l", "clip_g"],
    "a whole checkpoint": ["model.diffusion_model.input_blocks.0.0.weight"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_names_the_file_the_kind_and_a_key(kind, tmp_path, capsys) -> None:
    file = tmp_path / "other.safetensors"
    save_file({key: torch.arange(4.0).reshape(2, 2) for key in KINDS[kind]}, file)
    for read in (Adapter.load, load):
        with pytest.raises(UnknownFormatError, match=kind) as caught:
            read(file)
        said = str(caught.value)
        assert said.startswith(f"{file}: it is ")
        assert any(key in said for key in KINDS[kind])
        assert "\n" not in said
        assert len(said) - len(str(file)) < 300
    assert info([str(file)]) != 0
    assert capsys.readouterr().err.count("\n") == 1


def test_a_thousand_keys_make_no_longer_line(tmp_path) -> None:
    keys = [f"lora_unet_{'x' * 900}_{number}.hada_w1_a" for number in range(1000)]
    with pytest.raises(UnknownFormatError) as caught:
        Adapter.from_tensors(dict.fromkeys(keys, torch.ones(1)))
    assert len(str(caught.value)) < 300


def test_keys_of_no_kind() -> None:
    with pytest.raises(UnknownFormatError, match=r"something\.else is not a key"):
        Adapter.from_tensors({"something.else": torch.ones(1)})


def test_bundled_embeddings_are_kept_where_there_is_a_place_for_them(caplog, tmp_path) -> None:
    bundle = {"bundle_emb.mytok.string_to_param.*": torch.ones(2, 4), "bundle_emb.other.clip_l": torch.ones(2, 4)}
    with caplog.at_level(logging.WARNING):
        adapter = Adapter.from_tensors({**PAIR, **bundle})
    assert len(adapter.modules) == 1
    assert list(adapter.embeddings) == ["mytok.string_to_param.*", "other.clip_l"]
    assert list(Adapter.load(adapter.save(tmp_path / "a.safetensors")).embeddings) == list(adapter.embeddings)
    assert not caplog.text
    weighted_sum({"a": adapter, "b": adapter}, [1.0, 1.0])
    assert "the sum of adapters (b) cannot store embeddings" in caplog.text


# --- spellings of plain pairs -------------------------------------------------------------------------------------

QUERY = ModuleName("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
TEXT = ModuleName("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
DOWN, UP = torch.arange(8.0).reshape(2, 4), torch.arange(6.0).reshape(3, 2)


def pair(stem: str, down: str, up: str, alpha: float | None = None) -> dict[str, torch.Tensor]:
    tensors = {f"{stem}.{down}": DOWN, f"{stem}.{up}": UP}
    return tensors if alpha is None else {**tensors, f"{stem}.alpha": torch.tensor(alpha)}


SPELLINGS = {
    "a state dict with the adapter's name": (pair(str(QUERY), "lora_A.a_1.weight", "lora_B.a_1.weight"), 2.0),
    "a PeftModel's": (pair(f"unet.base_model.model.{QUERY.path}", "lora_A.weight", "lora_B.weight"), 2.0),
    "a PeftModel's with the name": (
        pair(f"unet.base_model.model.{QUERY.path}", "lora_A.default.weight", "lora_B.default.weight"),
        2.0,
    ),
    "kohya's halves": (pair(str(QUERY), "lora_down.weight", "lora_up.weight", 0.5), 0.5),
    "diffusers' halves and alpha": (pair(str(QUERY), "lora.down.weight", "lora.up.weight", 0.5), 0.5),
    "an alpha of 0": (pair(str(QUERY), "lora_down.weight", "lora_up.weight", 0.0), 2.0),
    "the original names": (
        pair("unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "lora_down.weight",
             "lora_up.weight", 1.0),
        1.0,
    ),
    "ComfyUI's": (
        pair("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "lora_A.weight", "lora_B.weight", 1.0),
        1.0,
    ),
    "without a component": (
        pair("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "lora_A.weight", "lora_B.weight", 1.0),
        1.0,
    ),
    "LyCORIS' wrapper's": (
        pair(f"lycoris_{QUERY.path.replace('.', '_')}", "lora_down.weight", "lora_up.weight", 1.0),
        1.0,
    ),
    **{
        f"{down} under a flat name": (pair(f"lora_unet_{QUERY.path.replace('.', '_')}", down, up, 1.0), 1.0)
        for down, up in (
            ("lora.down.weight", "lora.up.weight"),
            ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
            ("lora_A.default.weight", "lora_B.default.weight"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_pair(spelling) -> None:
    tensors, alpha = SPELLINGS[spelling]
    ((module, one),) = Adapter.from_tensors(tensors).modules.items()
    assert module == QUERY
    assert torch.equal(one.delta(), alpha / 2 * UP @ DOWN)


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g"])
@pytest.mark.parametrize("start", ["text_encoders.{}.transformer.text_model.", "{}.text_model.", "{}."])
def test_text_encoders_by_their_clip(encoder, start) -> None:
    stem = f"{start.format(encoder)}encoder.layers.0.mlp.fc1"
    ((module, one),) = Adapter.from_tensors(pair(stem, "lora_down.weight", "lora_up.weight", 1.0)).modules.items()
    assert module == TEXT._replace(component="text_encoder" if encoder == "clip_l" else "text_encoder_2")
    assert one.alpha == 1


def test_numbers_that_are_no_module_s_are_left_out() -> None:
    tensors = pair(str(QUERY), "lora_down.weight", "lora_up.weight", 1.0)
    notes = {"step": torch.tensor(100), "epoch": torch.tensor([3.0])}
    assert list(Adapter.from_tensors({**tensors, **notes}).modules) == [QUERY]
    with pytest.raises(AdapterError, match=r"foo\.bar"):
        Adapter.from_tensors({**tensors, "foo.bar": torch.ones(3)})


def test_alphas_that_are_plain_numbers() -> None:
    tensors = pair(str(QUERY), "lora_down.weight", "lora_up.weight")
    (one,) = Adapter.from_tensors({**tensors, f"{QUERY}.alpha": 0.5}).modules.values()
    assert one.alpha == 0.5
    with pytest.raises(AdapterError, match=r"alpha is of the type list, not a tensor"):
        Adapter.from_tensors({**tensors, f"{QUERY}.alpha": [[1], [1, 2]]})


def test_several_adapters_in_one_file() -> None:
    tensors = pair(str(QUERY), "lora_A.one.weight", "lora_B.one.weight")
    tensors |= pair(str(QUERY), "lora_A.two.weight", "lora_B.two.weight")
    with pytest.raises(AdapterError, match=r"several adapters \(one, two\)"):
        Adapter.from_tensors(tensors)


def test_two_spellings_of_one_matrix() -> None:
    tensors = pair(str(QUERY), "lora_A.weight", "lora_B.weight") | pair(
        str(QUERY), "lora.down.weight", "lora.up.weight"
    )
    with pytest.raises(AdapterError, match="another key stand for the same matrix"):
        Adapter.from_tensors(tensors)


# --- which model, which component -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "out_in", "architecture"),
    [
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", (640, 2048), "sdxl"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", (640, 768), "sd"),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", (640, 640), "sdxl"),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", (1280, 1280), "sd"),
        ("up_blocks.2.resnets.0.conv1", (320, 960), "sdxl"),
        ("up_blocks.2.resnets.0.conv1", (640, 1280), "sd"),
        ("up_blocks.0.attentions.0.proj_in", (8, 8), "sdxl"),
        ("up_blocks.3.attentions.0.proj_in", (8, 8), "sd"),
        ("add_embedding.linear_1", (8, 8), "sdxl"),
    ],
)
def test_small_adapters_are_for_sdxl_by_their_widths(path, out_in, architecture) -> None:
    out, inner = out_in
    adapter = Adapter({ModuleName("unet", path): LowRank(torch.ones(1, inner), torch.ones(out, 1), 1.0)})
    assert adapter.architecture == architecture


@pytest.mark.parametrize("targets", [["k_proj", "v_proj"], r".*self_attn\.(q|v)_proj", "all-linear", None])
@pytest.mark.parametrize(("component", "width"), [("text_encoder", 768), ("text_encoder_2", 1280)])
def test_a_folder_of_one_text_encoder_is_told_by_its_tensors(targets, component, width, tmp_path) -> None:
    module = ModuleName(component, "text_model.encoder.layers.0.self_attn.v_proj")
    Adapter({module: LowRank(torch.ones(1, width), torch.ones(width, 1), 1.0)}).save(tmp_path / "peft", "peft")
    folder = (tmp_path / "peft" / component).rename(tmp_path / "mine")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": targets}))
    assert set(Adapter.load(folder).modules) == {module}


def test_a_folder_with_an_unknown_module_names_it(tmp_path) -> None:
    module = ModuleName("unet", "mid_block.attentions.0.proj_in")
    folder = Adapter({module: LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}).save(tmp_path, "peft")
    weights = folder / "unet" / "adapter_model.safetensors"
    save_file({f"base_model.model.strange.lora_{half}.weight": torch.ones(1, 1) for half in "AB"}, weights)
    with pytest.raises(AdapterError, match=r"unet: unknown module unet\.strange") as caught:
        Adapter.load(folder)
    assert str(folder) in str(caught.value)
