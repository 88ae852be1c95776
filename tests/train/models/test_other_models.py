"""SD2.x and SDXL as the single files that they are handed around as: original names, open_clip's text encoders."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lora_adapters.convert import Adapter
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.base import load_base_models
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train
from tests.convert.checkpoints import open_clip
from tests.train.conftest import SCHEDULE, build_sdxl, text_config, tiny_tokenizer, tiny_vae
from tests.train.single_files import unet_name, vae_name


@pytest.fixture(scope="session")
def sd2(tmp_path_factory) -> Path:
    """SD2's marks: linear projections, cross attention over 1024 numbers, v-prediction."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = text_config(tokenizer)
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 1024, 16, 2
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        cross_attention_dim=1024,
        attention_head_dim=2,
        use_linear_projection=True,
        norm_num_groups=4,
    )
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "sd2"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sdxl_of_two_widths(tmp_path_factory) -> Path:
    """By their widths diffusers tells SDXL's text encoders apart in a single file."""
    return build_sdxl(tmp_path_factory.mktemp("models") / "sdxl2", second_width=48)


def text_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    loaded = load_file(folder / name / "model.safetensors")
    return {key if key.startswith("text_") else f"text_model.{key}": value for key, value in loaded.items()}


def whole_open_clip(weights: dict[str, torch.Tensor], prefix: str, **options) -> dict[str, torch.Tensor]:
    """open_clip's layers, embeddings, final norm and projection."""
    made = open_clip(weights, f"{prefix}transformer.", **options)
    made[f"{prefix}token_embedding.weight"] = weights["text_model.embeddings.token_embedding.weight"]
    made[f"{prefix}positional_embedding"] = weights["text_model.embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        made[f"{prefix}ln_final.{kind}"] = weights[f"text_model.final_layer_norm.{kind}"]
    width = made[f"{prefix}positional_embedding"].shape[1]
    projection = weights.get("text_projection.weight")
    made[f"{prefix}text_projection"] = torch.zeros(width, width) if projection is None else projection.T
    return made


def original_unet_name(name: str, kind: str) -> str:
    """SDXL has an embedding of sizes, and attention before the deepest upsampler."""
    if name.startswith("add_embedding.linear_"):
        return f"label_emb.0.{0 if 'linear_1' in name else 2}.{name.split('.')[-1]}"
    name = unet_name(name)
    return name.replace("output_blocks.2.1.conv.", "output_blocks.2.2.conv.") if kind == "sdxl" else name


def single_file(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """The whole model under its original names."""
    made = {}
    for name, weight in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        made[f"model.diffusion_model.{original_unet_name(name, kind)}"] = weight
    for name, weight in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        square = "attn_1" in vae_name(name) and weight.ndim == 2
        made[f"first_stage_model.{vae_name(name)}"] = weight[:, :, None, None] if square else weight
    if kind == "sd2":
        made |= whole_open_clip(text_weights(folder, "text_encoder"), "cond_stage_model.model.", spare_layer=True)
    else:
        first, second = (text_weights(folder, name) for name in ("text_encoder", "text_encoder_2"))
        made |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in first.items()}
        made |= whole_open_clip(second, "conditioner.embedders.1.model.")
    return {key: value.contiguous().clone() for key, value in made.items()}


@pytest.mark.parametrize(("kind", "ending"), [("sd2", "ckpt"), ("sdxl", "safetensors")])
def test_sd2_and_sdxl_from_a_single_file(sd2, sdxl_of_two_widths, basics, tmp_path, monkeypatch, kind, ending) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = {"sd2": sd2, "sdxl": sdxl_of_two_widths}[kind]
    file = tmp_path / f"m.{ending}"
    weights = single_file(folder, kind)
    torch.save({"state_dict": weights}, file) if ending == "ckpt" else save_file(weights, file)
    flags = {"v2": True, "v_parameterization": True} if kind == "sd2" else {}
    options = {**basics, **flags, "max_train_steps": 1, "save_state": True}
    places = (
        {"pretrained_model_name_or_path": file, "model_config": folder},
        {"pretrained_model_name_or_path": folder},
    )
    results = []
    for number, place in enumerate(places):
        merged = {**options, **place, "output_dir": str(tmp_path / str(number))}
        results.append(train(settings(**merged)))
    one, other = results
    assert one.models.kind == kind
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    adapter = Adapter.load(tmp_path / "0" / "last.safetensors")
    assert adapter.metadata["ss_base_model_version"] == {"sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}[kind]
    assert adapter.metadata["ss_v2"] == str(kind == "sd2")
    assert len(adapter.components) == (2 if kind == "sd2" else 3)
    assert adapter.modules.keys() == other.adapter.modules.keys()


def test_v_prediction_is_read_from_a_folder_and_is_the_target(sd2, fake_batch) -> None:
    """Without --v2 the folder's own scheduler tells; the loss of a perfect prediction of v is 0."""
    from lora_adapters.train.objective.losses import LossOptions
    from lora_adapters.train.objective.noise import NoiseOptions, generator
    from lora_adapters.train.objective.step_loss import StepLoss, StepOptions

    models = load_base_models(settings(pretrained_model_name_or_path=sd2))
    assert (models.kind, models.v_prediction) == ("sd2", True)
    batch = fake_batch(1)
    latents = batch.latents * models.vae.config.scaling_factor
    noise = torch.randn(4, 8, 8, generator=generator("held out", 0, 500))[None]
    signal = models.noise_schedule().alphas_cumprod[500]

    class Perfect(torch.nn.Module):
        def forward(self, noisy, timesteps, text, time_ids=None):
            torch.testing.assert_close(noisy, signal.sqrt() * latents + (1 - signal).sqrt() * noise)
            return signal.sqrt() * noise - (1 - signal).sqrt() * latents

        def encode(self, tokens):
            return None

    options = StepOptions(NoiseOptions(), LossOptions(v_prediction=True))
    loss = StepLoss(models, Perfect(), models.noise_schedule(), options, torch.device("cpu"))
    assert loss.held_out(batch, [500]).item() == pytest.approx(0, abs=1e-9)


def test_a_single_file_that_lacks_weights(sdxl_of_two_widths, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = single_file(sdxl_of_two_widths, "sdxl")
    del weights["conditioner.embedders.1.model.text_projection"]
    save_file(weights, tmp_path / "m.safetensors")
    chosen = settings(pretrained_model_name_or_path=tmp_path / "m.safetensors", model_config=sdxl_of_two_widths)
    with pytest.raises(TrainingError, match=r"lacks text_projection.weight of the text_encoder_2"):
        load_base_models(chosen)
