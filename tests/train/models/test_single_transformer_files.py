"""A merged folder of Flux.1 or SD3 is written as one file, which is the folder's model again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert.merge_lora import main
from lora_adapters.train.models.base import load_base_models
from lora_adapters.train.options.arguments import settings

from ..transformer_files import original_transformer
from ..transformers import build_flux, build_sd3


@pytest.mark.parametrize("build", [build_flux, build_sd3])
def test_a_merge_into_a_folder_is_written_as_one_file(build, tmp_path) -> None:
    folder = build(tmp_path / "model")
    family = "flux" if build is build_flux else "sd3"
    name = "double_blocks.0.img_attn.qkv" if family == "flux" else "joint_blocks.0.x_block.attn.qkv"
    key = f"lora_unet_{name.replace('.', '_')}"
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    adapter = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    save_file(adapter, tmp_path / "a.safetensors")
    for target in ("one.safetensors", "folder"):
        words = ["--sd_model", folder, "--save_to", tmp_path / target, "--models", tmp_path / "a.safetensors"]
        assert main([*map(str, words), "--ratios", "1.0"]) == 0
    written, before = load_file(tmp_path / "one.safetensors"), original_transformer(folder, family)
    found = {
        key.removeprefix("model.diffusion_model."): one for key, one in written.items() if "diffusion_model" in key
    }
    assert found.keys() == before.keys()
    for tensor, weight in before.items():
        wanted = weight + up @ down if tensor == f"{name}.weight" else weight
        torch.testing.assert_close(found[tensor], wanted, atol=1e-5, rtol=1e-5)
    one = load(tmp_path / "one.safetensors", folder)
    other = load(tmp_path / "folder", None)
    for mine, theirs in zip(
        (*one.text_encoders, one.vae, one.denoiser), (*other.text_encoders, other.vae, other.denoiser), strict=True
    ):
        weights = theirs.state_dict()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in mine.state_dict().items())


def load(model: Path, config: Path | None):
    return load_base_models(settings(pretrained_model_name_or_path=str(model), model_config=config and str(config)))
