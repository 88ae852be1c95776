"""Diffusers folders written as one file in the original layout, read back by diffusers' from_single_file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.families.original_layout import vae_origins
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.tools.merge import merge_into_model
from tests.convert.checkpoints import GOLDEN, open_clip, original, original_unet_name, weights
from tests.convert.scripts import fails, run
from tests.train.single_files import checkpoint as originals_of

TINY = Path(__file__).parents[3] / "examples" / "tiny-sd"
QUERY = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")


def edit(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A complete tiny model of that kind."""
    made = tmp_path / "folder"
    if kind == "sdxl":
        shutil.copytree(GOLDEN / "sdxl", made, ignore=shutil.ignore_patterns("*_xl.*", "expected.*"))
        shutil.copytree(TINY / "vae", made / "vae")
        classes = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
                   "text_encoder": ["transformers", "CLIPTextModel"],
                   "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}  # fmt: skip
        (made / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **classes}))
    else:
        shutil.copytree(TINY, made, ignore=shutil.ignore_patterns("*.py", "*.md", "*.png"))
    if kind == "sd2":
        edit(made / "text_encoder" / "config.json", hidden_act="gelu")
    return made


def adapter_of(folder, components=("unet",)):
    """An adapter of every module that the folder's components have."""
    generator, modules = torch.Generator().manual_seed(3), {}
    opened = Checkpoint.open(folder)
    for module in opened.modules:
        if module.component in components:
            out, *rest = opened.weight(module).shape
            down = torch.randn(2, *rest, generator=generator) * 0.1
            modules[module] = LowRank(down, torch.randn(out, 2, *(1 for _ in rest[1:]), generator=generator), 1.0)
    return Adapter(modules)


def from_single_file(file, folder):
    """The weights of each component as diffusers opens the file."""
    found = {}
    for component, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        found[component] = cls.from_single_file(str(file), config=str(folder), subfolder=component)
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file)["state_dict"]
    for component, cls in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if (folder / component).is_dir():
            config = str(folder)
            found[component] = create_diffusers_clip_model_from_ldm(cls, dict(tensors), component, config)
    return {component: model.state_dict() for component, model in found.items()}


def from_pretrained(folder):
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
               "text_encoder_2": CLIPTextModelWithProjection}  # fmt: skip
    there = {component: cls for component, cls in classes.items() if (folder / component).is_dir()}
    return {
        component: cls.from_pretrained(folder, subfolder=component, torch_dtype="auto").state_dict()
        for component, cls in there.items()
    }


def the_same(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key].to(tensor.dtype)), key


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_diffusers_reads_the_file_as_the_folder_merged(kind, folder, ending, tmp_path):
    """Bit for bit what merging into a folder gives, in every component."""
    adapter = adapter_of(folder, ("unet", "text_encoder", "text_encoder_2"))
    merged = merge_into_model(folder, tmp_path / "merged", [adapter], [0.5])
    file = merge_into_model(folder, tmp_path / f"x.{ending}", [adapter], [0.5])
    assert file.is_file()
    found, wanted = from_single_file(file, folder), from_pretrained(merged)
    assert found.keys() == wanted.keys()
    for component in wanted:
        the_same(wanted[component], found[component])
    before = from_pretrained(folder)
    assert not torch.equal(before["unet"][f"{QUERY.path}.weight"], wanted["unet"][f"{QUERY.path}.weight"])
    opened, parts = Checkpoint.open(file), Checkpoint.open(merged)
    assert opened.architecture == ("sdxl" if kind == "sdxl" else "sd")
    assert opened.base_version == parts.base_version
    assert adapter.modules.keys() <= opened.modules.keys()
    for module in adapter.modules:
        assert torch.equal(opened.weight(module), parts.weight(module)), module


def test_names_and_shapes_are_the_originals(kind, folder, tmp_path):
    """Against names written down independently of the program's; an adapter that changes nothing."""
    found = load_file(merge_into_model(folder, tmp_path / "x.safetensors", [adapter_of(folder)], [0.0]))
    wanted = {
        f"model.diffusion_model.{name}": tensor
        for key, tensor in weights(folder, "unet").items()
        for name in [original_unet_name(key, kind)]
    }
    wanted |= {key: tensor for key, tensor in originals_of(TINY).items() if key.startswith("first_stage_model.")}
    text = weights(folder, "text_encoder")
    if kind == "sd2":
        wanted |= complete_open_clip(text, "cond_stage_model.model.")
    else:
        prefix = "conditioner.embedders.0." if kind == "sdxl" else "cond_stage_model."
        wanted |= {f"{prefix}transformer.{key}": tensor for key, tensor in text.items()}
    if kind == "sdxl":
        second = weights(folder, "text_encoder_2")
        wanted |= complete_open_clip(second, "conditioner.embedders.1.model.")
        wanted["conditioner.embedders.1.model.text_projection"] = second["text_projection.weight"].T
    the_same(wanted, found)


def complete_open_clip(text, prefix):
    made = open_clip(text, f"{prefix}transformer.")
    last = 1 + max(int(key.split(".")[3]) for key in text if ".layers." in key)
    for layer in range(last):
        for ours, theirs in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
            for end in ("weight", "bias"):
                key = f"text_model.encoder.layers.{layer}.{ours}.{end}"
                made[f"{prefix}transformer.resblocks.{layer}.{theirs}.{end}"] = text[key]
    embeddings = "text_model.embeddings."
    made[f"{prefix}token_embedding.weight"] = text[f"{embeddings}token_embedding.weight"]
    made[f"{prefix}positional_embedding"] = text[f"{embeddings}position_embedding.weight"]
    for end in ("weight", "bias"):
        made[f"{prefix}ln_final.{end}"] = text[f"text_model.final_layer_norm.{end}"]
    return made


def test_original_to_folder_to_original(tmp_path):
    """A file opened by diffusers, saved as a folder, and written as a file again is what it was."""
    first = {key: tensor.float() for key, tensor in originals_of(TINY).items()}
    save_file(first, tmp_path / "first.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "first.safetensors"), config=str(TINY), safety_checker=None, torch_dtype=torch.float32
    )
    pipe.save_pretrained(tmp_path / "folder")
    nothing = adapter_of(tmp_path / "folder").scale(0.0)
    the_same(first, load_file(nothing.merge_into(tmp_path / "folder", tmp_path / "again.safetensors")))


def test_the_whole_pipeline_opens_the_file(tmp_path):
    file = adapter_of(TINY).merge_into(TINY, tmp_path / "x.safetensors", 0.1)
    folder = adapter_of(TINY).merge_into(TINY, tmp_path / "x", 0.1)
    images = []
    for pipe in (
        StableDiffusionPipeline.from_single_file(str(file), config=str(TINY), safety_checker=None),
        StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32),
    ):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        images.append(pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images)
    assert (images[0] == images[1]).all()


def test_the_program_writes_one_file_and_says_so(tmp_path, capsys):
    lora = adapter_of(TINY).save(tmp_path / "a.safetensors")
    target = tmp_path / "out" / "x.safetensors"
    said = run(capsys, "merge", "--sd_model", TINY, "--save_to", target, "--models", lora, "--save_precision", "fp16")
    assert "original layout" in said
    assert target.is_file()
    with safe_open(target, "pt") as opened:
        assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {"F16"}  # noqa: SIM118
        assert opened.metadata()["modelspec.merged_from"] == "tiny-sd, a"


def test_a_model_that_predicts_v_is_marked(tmp_path):
    """SDXL files that predict v have an empty tensor for a sign; SD2's are told by their yaml or their weights."""
    made = Path(shutil.copytree(GOLDEN / "sdxl", tmp_path / "folder"))
    shutil.copytree(TINY / "vae", made / "vae")
    (made / "scheduler").mkdir()
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (made / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter_of(made).merge_into(made, tmp_path / "v.safetensors"))
    assert tensors["v_pred"].numel() == 0
    assert tensors["ztsnr"].numel() == 0
    edit(made / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    assert "v_pred" not in load_file(adapter_of(made).merge_into(made, tmp_path / "eps.safetensors"))


def test_the_main_variant_is_written(tmp_path):
    """A folder with fp16 files beside the main ones gives the main ones; of one variant alone, that."""
    folder = Path(shutil.copytree(TINY, tmp_path / "folder"))
    adapter = adapter_of(folder)
    wanted = load_file(adapter.merge_into(folder, tmp_path / "wanted.safetensors"))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 2 for key, tensor in load_file(unet).items()}, unet.with_suffix(".fp16.safetensors"))
    the_same(wanted, load_file(adapter.merge_into(folder, tmp_path / "main.safetensors")))
    shutil.copy(unet, unet.with_suffix(".fp16.safetensors"))
    unet.unlink()
    the_same(wanted, load_file(adapter.merge_into(folder, tmp_path / "only.safetensors")))
    shutil.copy(unet.with_suffix(".fp16.safetensors"), unet.with_suffix(".bf16.safetensors"))
    with pytest.raises(AdapterError, match=r"several variants and no main one \(bf16, fp16\)"):
        adapter.merge_into(folder, tmp_path / "none.safetensors")


def test_what_has_no_place_in_one_file_is_refused(tmp_path, capsys):
    folder = Path(shutil.copytree(TINY, tmp_path / "folder"))
    lora = adapter_of(folder).save(tmp_path / "a.safetensors")
    words = ("merge", "--sd_model", folder, "--save_to", tmp_path / "x.safetensors", "--models", lora)
    for name in ("x.pt", "x.SAFETENSORS"):
        said = fails(capsys, "merge", "--sd_model", folder, "--save_to", tmp_path / name, "--models", lora)
        assert "must end in .safetensors or .ckpt" in said
    (folder / "image_encoder").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "image_encoder" / "model.safetensors")
    assert "image_encoder" in fails(capsys, *words)
    shutil.rmtree(folder / "image_encoder")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "encoder_hid_proj.weight": torch.zeros(1)}, file)
    said = fails(capsys, *words)
    assert "encoder_hid_proj.weight" in said
    assert "folder" in said
    shutil.rmtree(folder / "vae")
    shutil.copy(TINY / "unet" / file.name, file)
    assert "no vae" in fails(capsys, *words)
    assert not (tmp_path / "x.safetensors").exists()


def test_old_names_of_the_vae_attention():
    """As folders of diffusers before 0.17 have them."""
    start = "decoder.mid_block.attentions.0."
    names = vae_origins([f"{start}{part}.weight" for part in ("query", "key", "value", "proj_attn", "group_norm")])
    assert [(name.removeprefix("first_stage_model.decoder.mid.attn_1."), one.form) for name, one in names.items()] == [
        ("q.weight", "conv"), ("k.weight", "conv"), ("v.weight", "conv"), ("proj_out.weight", "conv"),
        ("norm.weight", "same"),
    ]  # fmt: skip


def test_unclip_files_are_no_sdxl(tmp_path):
    """SD2.1-unclip has label_emb too, for the image's embedding."""
    tensors = original("sd2")
    tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "unclip.safetensors")
    assert Checkpoint.open(tmp_path / "unclip.safetensors").architecture == "sd"
    only_unet = {key: tensor for key, tensor in tensors.items() if key.startswith("model.diffusion_model.")}
    save_file(only_unet, tmp_path / "unet.safetensors")
    assert Checkpoint.open(tmp_path / "unet.safetensors").architecture == "sd"
    sdxl = {key: tensor for key, tensor in original("sdxl").items() if key.startswith("model.diffusion_model.")}
    save_file(sdxl, tmp_path / "sdxl.safetensors")
    assert Checkpoint.open(tmp_path / "sdxl.safetensors").architecture == "sdxl"
