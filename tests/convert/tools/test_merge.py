"""Sums of adapters and adapters in models, against dense arithmetic, golden outputs and live pipelines."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.tools.merge import merge_into_model, weighted_sum
from tests.convert.checkpoints import GOLDEN, original
from tests.train.single_files import checkpoint as single_file

TINY = Path(__file__).parents[3] / "examples" / "tiny-sd"
PATHS = (
    ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", (6, 5)),
    ("unet", "mid_block.attentions.0.proj_in", (4, 7, 1, 1)),
    ("unet", "mid_block.resnets.0.conv1", (3, 4, 3, 3)),
    ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", (8, 3)),
)


@st.composite
def adapters(draw, most_rank=4, dtypes=(torch.float32, torch.float16, torch.bfloat16)):
    """Random adapters of random modules, ranks, alphas and dtypes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    modules = {}
    for component, path, shape in draw(st.lists(st.sampled_from(PATHS), min_size=1, unique=True)):
        rank, dtype = draw(st.integers(1, most_rank)), draw(st.sampled_from(dtypes))
        alpha = draw(st.sampled_from([0.5, 1.0, 4.0, -2.0]))
        flat = len(shape) == 4 and shape[2:] == (1, 1) and draw(st.booleans())  # the 2-D spelling of a 1x1 convolution
        kernel = () if flat else shape[2:]
        down = torch.randn(rank, shape[1], *kernel, generator=generator).to(dtype)
        up = torch.randn(shape[0], rank, *(1 for _ in kernel), generator=generator).to(dtype)
        modules[ModuleName(component, path)] = LowRank(down, up, alpha)
    return Adapter(modules)


def dense(adapter, module, shape):
    one = adapter.modules.get(module)
    return torch.zeros(shape, dtype=torch.float64) if one is None else one.delta(dtype=torch.float64).reshape(shape)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(adapters(), st.sampled_from([-1.0, 0.3, 0.5, 2.0])), min_size=1, max_size=4))
def test_a_sum_is_the_sum_of_weighted_changes(parts):
    total = weighted_sum({str(n): adapter for n, (adapter, _) in enumerate(parts)}, [weight for _, weight in parts])
    for component, path, shape in PATHS:
        module = ModuleName(component, path)
        wanted = sum(weight * dense(adapter, module, shape) for adapter, weight in parts)
        assert (module in total.modules) == any(module in adapter.modules for adapter, _ in parts)
        torch.testing.assert_close(dense(total, module, shape), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(adapters(), st.sampled_from(["kohya", "kohya.pt", "diffusers", "peft"]))
def test_every_format_keeps_the_change(tmp_path_factory, adapter, format):
    folder = tmp_path_factory.mktemp("formats")
    kind, _, ending = format.partition(".")
    again = Adapter.load(adapter.save(folder / ("a" if kind == "peft" else f"a.{ending or 'safetensors'}"), kind))
    assert set(again.modules) == set(adapter.modules)
    for component, path, shape in PATHS:
        module = ModuleName(component, path)
        wanted = dense(adapter, module, shape)
        if module not in adapter.modules or kind != "diffusers":  # the factors and alpha as they were
            assert torch.equal(dense(again, module, shape), wanted)
        else:  # alpha goes into `up`, which is rounded to its dtype
            one = adapter.modules[module]
            rounding = one.scale * one.up.double().abs().flatten(1) @ one.down.double().abs().flatten(1)
            difference = (dense(again, module, shape) - wanted).abs().flatten(1)
            assert bool((difference <= torch.finfo(one.up.dtype).eps * rounding.abs() + 1e-6).all())


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_merging_into_a_model_adds_the_weighted_changes(tmp_path_factory, data):
    """Any number of adapters into a model of any dtype; what no adapter touches stays bit for bit."""
    folder, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    names = {
        "unet": {f"{path}.weight": shape for component, path, shape in PATHS if component == "unet"},
        "text_encoder": {f"{path}.weight": shape for component, path, shape in PATHS if component != "unet"},
    }
    for component, shapes in names.items():
        (folder / "in" / component).mkdir(parents=True)
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        save_file({**tensors, "norm.weight": torch.randn(3).to(dtype)}, folder / "in" / component / "model.safetensors")
    parts = data.draw(st.lists(st.tuples(adapters(), st.sampled_from([-1.0, 0.3, 2.0])), min_size=1, max_size=3))
    several, weights = [adapter for adapter, _ in parts], [weight for _, weight in parts]
    merge_into_model(folder / "in", folder / "out", several, weights)
    for component in names:
        before, after = (load_file(folder / side / component / "model.safetensors") for side in ("in", "out"))
        assert before.keys() == after.keys()
        for name, weight in before.items():
            module = ModuleName(component, name.removesuffix(".weight"))
            changed = any(module in adapter.modules for adapter in several)
            assert after[name].dtype == dtype
            if not changed:
                assert torch.equal(after[name], weight)
                continue
            wanted = weight.double()
            for adapter, ratio in parts:
                wanted = wanted + ratio * dense(adapter, module, weight.shape)
            size = sum(abs(ratio) * dense(adapter, module, weight.shape).abs() for adapter, ratio in parts)
            allowed = torch.finfo(dtype).eps * wanted.abs() + 1e-5 * (size + 1)
            assert bool(((after[name].double() - wanted).abs() <= allowed).all())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(adapters(), st.sampled_from([-1.0, 0.5])), min_size=1, max_size=3))
def test_svd_at_full_rank_is_the_sum(parts):
    total = weighted_sum({str(n): adapter for n, (adapter, _) in enumerate(parts)}, [weight for _, weight in parts])
    whole = total.svd(64, 64)
    for component, path, shape in PATHS:
        module = ModuleName(component, path)
        wanted = sum(weight * dense(adapter, module, shape) for adapter, weight in parts)
        size = max(float(dense(adapter, module, shape).norm()) for adapter, _ in parts) + 1e-9
        assert float((dense(whole, module, shape) - wanted).norm()) < 1e-5 * size


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "inpainting"])
@torch.no_grad()
def test_diffusers_opens_merged_checkpoints_of_every_version(kind, tmp_path):
    """The U-Net of the merged file through from_single_file gives what the golden network with the adapter gives."""
    golden, name = ("sdxl", "lierla_xl") if kind == "sdxl" else ("sd15", "c3lier")
    tensors = original("sd1" if kind == "inpainting" else kind)
    options = {}
    if kind == "inpainting":  # 9 input channels; those of the mask and the masked image do nothing here
        key = "model.diffusion_model.input_blocks.0.0.weight"
        tensors[key] = torch.cat([tensors[key], torch.zeros(len(tensors[key]), 5, 3, 3)], dim=1)
    save_file(tensors, tmp_path / "in.safetensors")
    Adapter.load(GOLDEN / golden / f"{name}.safetensors").merge_into(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.7
    )
    config = json.loads((GOLDEN / golden / "unet" / "config.json").read_text())
    (tmp_path / "unet").mkdir()
    config["in_channels"] = 9 if kind == "inpainting" else config["in_channels"]
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    unet = UNet2DConditionModel.from_single_file(
        str(tmp_path / "out.safetensors"), config=str(tmp_path), subfolder="unet", torch_dtype=torch.float32
    )
    expected = load_file(GOLDEN / golden / "expected.safetensors")
    latents = expected["latents"]
    if kind == "inpainting":
        latents = torch.cat([latents, torch.ones(len(latents), 5, *latents.shape[2:])], dim=1)
    if kind == "sdxl":
        options["added_cond_kwargs"] = {"text_embeds": expected["pooled"], "time_ids": expected["time_ids"]}
    found = unet(latents, 7, expected["context"], **options).sample
    wanted = expected[f"{name}.x0.7.unet"]
    change = float((wanted - expected["base.unet"]).norm())
    assert float((found - wanted).norm()) < 2e-3 * change


def golden_outputs(unet, encoders, expected):
    result, extra = {"text": encoders[0](expected["input_ids"])[0]}, {}
    if len(encoders) == 2:
        result["text_2"] = encoders[1](expected["input_ids"]).text_embeds
        extra["added_cond_kwargs"] = {"text_embeds": expected["pooled"], "time_ids": expected["time_ids"]}
    result["unet"] = unet(expected["latents"], 7, expected["context"], **extra).sample
    return result


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in {
        "sd15": ("c3lier", "lierla_fp16", "block_dims_alphas_conv", "text_encoder_only", "dylora"),
        "sdxl": ("c3lier_xl", "block_xl"),
    }.items() for name in names],
)  # fmt: skip
@pytest.mark.parametrize("weight", ["1.0", "0.7"])
@torch.no_grad()
def test_a_merged_model_loaded_plain_gives_what_kohyas_network_gives(kind, name, weight, tmp_path):
    expected = load_file(GOLDEN / kind / "expected.safetensors")
    adapter = Adapter.load(GOLDEN / kind / f"{name}.safetensors")
    out = adapter.merge_into(GOLDEN / kind, tmp_path / "merged", float(weight))
    encoders = [CLIPTextModel.from_pretrained(out / "text_encoder")]
    if kind == "sdxl":
        encoders.append(CLIPTextModelWithProjection.from_pretrained(out / "text_encoder_2"))
    found = golden_outputs(UNet2DConditionModel.from_pretrained(out / "unet"), encoders, expected)
    for part, value in found.items():
        wanted = expected[f"{name}.x{weight}.{part}"]
        change = float((wanted - expected[f"base.{part}"]).norm())
        assert float((value - wanted).norm()) < 1e-3 * (change if change > 1e-6 else 1.0), part


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_single_files_and_folders_get_the_same_weights(kind, tmp_path):
    golden, name = ("sdxl", "c3lier_xl") if kind == "sdxl" else ("sd15", "c3lier")
    adapter = Adapter.load(GOLDEN / golden / f"{name}.safetensors")
    save_file(original(kind), tmp_path / "in.safetensors")
    file = Checkpoint.open(adapter.merge_into(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.6))
    folder = Checkpoint.open(adapter.merge_into(GOLDEN / golden, tmp_path / "folder", 0.6))
    base = Checkpoint.open(GOLDEN / golden)
    for module, one in adapter.modules.items():
        weight = base.weight(module).double()
        wanted = weight + 0.6 * one.delta(dtype=torch.float64).reshape(weight.shape)
        torch.testing.assert_close(file.weight(module).double(), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(file.weight(module), folder.weight(module))


def test_several_at_once(tmp_path):
    names = ("c3lier", "unet_only", "lierla_bf16")
    several = [Adapter.load(GOLDEN / "sd15" / f"{name}.safetensors") for name in names]
    out = Checkpoint.open(merge_into_model(GOLDEN / "sd15", tmp_path / "out", several, [0.5, -1.0, 0.25]))
    base = Checkpoint.open(GOLDEN / "sd15")
    for module in base.modules:
        wanted = base.weight(module).double()
        for adapter, weight in zip(several, [0.5, -1.0, 0.25], strict=True):
            wanted = wanted + weight * dense(adapter, module, wanted.shape)
        torch.testing.assert_close(out.weight(module).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def tiny_adapter():
    """An adapter of tiny-sd that changes its images visibly."""
    generator, modules = torch.Generator().manual_seed(5), {}
    opened = Checkpoint.open(TINY)
    for module in opened.modules:
        weight = opened.weight(module)
        shape = weight.shape
        down = torch.randn(4, *shape[1:], generator=generator) * 0.1
        up = torch.randn(shape[0], 4, *(1 for _ in shape[2:]), generator=generator) * 0.02
        modules[module] = LowRank(down, up, 2.0)
    return Adapter(modules)


def image_of(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(
        pipe("a red apple", num_inference_steps=3, generator=generator, output_type="np", height=64, width=64).images
    )


@pytest.mark.parametrize("form", ["folder", "safetensors", "ckpt"])
def test_images_of_the_merged_model_are_those_of_the_adapter_in_the_pipeline(form, tiny_adapter, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, torch_dtype=torch.float32)
    plain = image_of(pipe)
    tiny_adapter.save(tmp_path / "a.safetensors", fold_alpha=True)
    pipe.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [0.8])
    wanted = image_of(pipe)
    assert float((wanted - plain).abs().mean()) > 0.01
    if form == "folder":
        merged = StableDiffusionPipeline.from_pretrained(
            merge_into_model(TINY, tmp_path / "merged", [tiny_adapter], [0.8], dtype=torch.float32),
            safety_checker=None,
            torch_dtype=torch.float32,
        )
    else:
        source, out = tmp_path / f"in.{form}", tmp_path / f"out.{form}"
        save_file(single_file(TINY), source) if form == "safetensors" else torch.save(single_file(TINY), source)
        merge_into_model(source, out, [tiny_adapter], [0.8], dtype=torch.float32)
        merged = StableDiffusionPipeline.from_single_file(
            str(out), config=str(TINY), safety_checker=None, torch_dtype=torch.float32
        )
    torch.testing.assert_close(image_of(merged), wanted, rtol=0, atol=2e-3)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    sd, sdxl = (str(GOLDEN / name) for name in ("sd15/lierla.safetensors", "sdxl/lierla_xl.safetensors"))
    with pytest.raises(AdapterError, match=r"sd15/lierla.*SD1.x.*sdxl/lierla_xl.*SDXL"):
        weighted_sum({sd: Adapter.load(sd), sdxl: Adapter.load(sdxl)}, [1, 1])
    with pytest.raises(AdapterError, match=r"for SDXL, but .*sd15 is SD1"):
        Adapter.load(sdxl).merge_into(GOLDEN / "sd15", tmp_path / "out")
    shutil.copytree(GOLDEN / "sd15" / "unet", tmp_path / "model" / "unet")
    with pytest.raises(AdapterError, match=r"changes text_encoder.*does not have; no text_encoder"):
        Adapter.load(sd).merge_into(tmp_path / "model", tmp_path / "out")
    q = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    for width, family in ((768, "SD1.x"), (1024, "SD2.x"), (99, "")):
        adapter = Adapter({q: LowRank(torch.zeros(2, width), torch.zeros(1280, 2), 1.0)})
        with pytest.raises(AdapterError, match=rf"expects {q} of \[1280, {width}\]"):
            adapter.merge_into(GOLDEN / "sd15", tmp_path / "out")
        if family == "SD2.x":
            with pytest.raises(AdapterError, match=r"SD1.x, but b is for SD2.x"):
                weighted_sum({"a": Adapter.load(sd), "b": adapter}, [1, 1])
    bad = Adapter({q: LowRank(torch.full((2, 4), float("nan")), torch.zeros(4, 2), 1.0)})
    with pytest.raises(AdapterError, match=f"{q}: down has NaN"):
        weighted_sum({"a": bad}, [1])
    assert not (tmp_path / "out").exists()
