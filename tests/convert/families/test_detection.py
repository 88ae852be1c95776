"""Which model an adapter is for where its file does not say it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_adapters.convert import Adapter, choices
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.detection import base_model_of, check_one_family, titles_of
from lora_adapters.convert.families.registry import FAMILIES
from lora_adapters.convert.families.spelling import fuses

ATTENTION = "lora_unet_middle_block_1_transformer_blocks_0"


def pair(name: str, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_down.weight": torch.ones(2, in_features),
        f"{name}.lora_up.weight": torch.ones(out_features, 2),
    }


def loha(name: str, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    parts = {"w1_a": (out_features, 2), "w1_b": (2, in_features), "w2_a": (out_features, 2), "w2_b": (2, in_features)}
    return {f"{name}.hada_{part}": torch.ones(shape) for part, shape in parts.items()}


@pytest.mark.parametrize("made", [pair, loha])
@pytest.mark.parametrize(("width", "title"), [(768, "SD1.x"), (1024, "SD2.x"), (2048, "SDXL")])
def test_the_original_codes_names_are_not_only_sdxls(made, width, title) -> None:
    tensors = made(f"{ATTENTION}_attn1_to_q", 1280, 1280) | made(f"{ATTENTION}_attn2_to_k", 1280, width)
    adapter = Adapter.from_tensors(tensors, {})
    assert base_model_of(adapter.modules, adapter.metadata).title == title


def test_they_are_sdxls_where_no_width_tells() -> None:
    adapter = Adapter.from_tensors(pair(f"{ATTENTION}_attn1_to_q", 1280, 1280), {})
    assert base_model_of(adapter.modules, adapter.metadata).title == "SDXL"


def test_options_choose_from_all_families_of_transformers() -> None:
    assert [family.name for family in FAMILIES if fuses(family)] == list(choices.FAMILIES)


ATTENTION_OF_BLOCKS = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")]


def attention(width: int, blocks: int) -> dict[str, torch.Tensor]:
    """What diffusers' training scripts write by default, for all models with such blocks alike."""
    paths = [f"transformer.transformer_blocks.{n}.{name}" for n in range(blocks) for name in ATTENTION_OF_BLOCKS]
    empty = {"device": "meta"}
    return {
        **{f"{path}.lora_A.weight": torch.ones(1, width, **empty) for path in paths},
        **{f"{path}.lora_B.weight": torch.ones(width, 1, **empty) for path in paths},
    }


@pytest.mark.parametrize(
    ("width", "blocks", "names"),
    [
        (1536, 24, ["sd3"]),
        (2432, 38, ["sd3"]),
        (3072, 60, ["qwen_image"]),
        (4096, 8, ["flux2"]),
        (6144, 8, ["flux2"]),
        (3072, 19, ["flux", "chroma", "qwen_image"]),
        (3072, 5, ["flux", "chroma", "flux2", "qwen_image"]),
        (16, 2, ["flux", "chroma", "sd3", "flux2", "qwen_image"]),
    ],
)
def test_sizes_of_released_models_tell_families_with_the_same_names_apart(width, blocks, names) -> None:
    adapter = Adapter.from_tensors(attention(width, blocks), {})
    assert [family.name for family in adapter.candidates] == names
    assert adapter.metadata.get("ss_base_model_version", "") == (adapter.family.stated if len(names) == 1 else "")


@pytest.mark.parametrize(
    ("name", "out_in", "family", "path"),
    [
        ("single_blocks.0.linear2", (3072, 15360), "flux", "single_transformer_blocks.0.proj_out"),
        ("single_blocks.0.linear2", (3072, 12288), "flux2", "single_transformer_blocks.0.attn.to_out"),
        ("double_blocks.0.img_mlp.2", (3072, 12288), "flux", "transformer_blocks.0.ff.net.2"),
        ("double_blocks.0.img_mlp.2", (3072, 9216), "flux2", "transformer_blocks.0.ff.linear_out"),
        ("layers.0.attention.out", (2304, 2304), "lumina2", "layers.0.attn.to_out.0"),
        ("layers.0.attention.out", (3840, 3840), "zimage", "layers.0.attention.to_out.0"),
        ("layers.0.feed_forward.w1", (9216, 2304), "lumina2", "layers.0.feed_forward.linear_1"),
        ("layers.0.feed_forward.w1", (10240, 3840), "zimage", "layers.0.feed_forward.w1"),
    ],
)
def test_one_layer_is_told_by_its_sizes(name, out_in, family, path) -> None:
    adapter = Adapter.from_tensors(pair(f"diffusion_model.{name}", *out_in), {})
    assert adapter.architecture == family
    assert [module.path for module in adapter.modules] == [path]


def saved(adapter: Adapter, path: Path) -> dict[str, str]:
    with safe_open(adapter.save(path, "kohya"), "pt") as file:
        return {**file.metadata(), "key": min(file.keys())}


def test_names_that_differ_between_families_are_not_guessed(tmp_path) -> None:
    tensors = {key: torch.ones(tensor.shape) for key, tensor in attention(16, 2).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert titles_of(adapter.modules, adapter.metadata) == "Flux.1 or Chroma or SD3 or Flux.2 or Qwen-Image"
    with pytest.raises(AdapterError, match=r"is a layer of several models .*--base_model"):
        adapter.save(tmp_path / "b.safetensors", "kohya")
    assert not (tmp_path / "b.safetensors").exists()
    begins = {"flux": "double_blocks_0", "sd3": "joint_blocks_0", "qwen_image": "transformer_blocks_0"}
    for name, begin in begins.items():
        of_family = Adapter.load(tmp_path / "a.safetensors", base_model=name)
        found = saved(of_family, tmp_path / f"{name}.safetensors")
        assert found["key"].startswith(f"lora_unet_{begin}")
        assert found["ss_base_model_version"] == of_family.family.stated
        again = Adapter.load(tmp_path / f"{name}.safetensors")
        assert set(again.modules) >= set(adapter.modules)  # and other parts of fused layers
    with pytest.raises(AdapterError, match=r"is not a module of Z-Image"):
        Adapter.load(tmp_path / "a.safetensors", base_model="zimage")


def test_what_families_with_the_same_names_would_say_is_not_said(tmp_path) -> None:
    """Flux.1's and Chroma's files have the same names: neither is stated, and both can be merged with it."""
    adapter = Adapter.from_tensors(pair("diffusion_model.single_blocks.0.linear1", 7 * 16, 16), {})
    found = saved(adapter, tmp_path / "a.safetensors")
    assert not {"ss_base_model_version", "modelspec.architecture", "modelspec.implementation"} & set(found)
    chroma = Adapter.from_tensors(
        pair("lora_unet_double_blocks_0_img_mlp_0", 64, 16), {"ss_base_model_version": "chroma"}
    )
    total = adapter + chroma
    assert total.architecture == "chroma"
    check_one_family({"a": adapter, "b": chroma})
    check_one_family({})  # as an image is drawn without adapters
    sd3 = Adapter.from_tensors(pair("diffusion_model.joint_blocks.0.x_block.mlp.fc1", 64, 16), {})
    with pytest.raises(AdapterError, match="they cannot be combined"):
        check_one_family({"a": adapter, "b": sd3})
