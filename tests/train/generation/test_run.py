import json
import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file

from lora_adapters.adapter import Adapter
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.convert.tools.block_weights import parse, weighted
from lora_adapters.train.gen_img_diffusers import main
from lora_adapters.train.models.schedulers import sampler
from tests.train.generating import adapter_for, differ, draw, pixels, web_ui_reads
from tests.train.single_files import checkpoint


@pytest.fixture(scope="module")
def lora(sd1, tmp_path_factory):
    return adapter_for(sd1, tmp_path_factory.mktemp("adapters") / "one.safetensors")


@pytest.fixture(scope="module")
def other(sd1, tmp_path_factory):
    return adapter_for(sd1, tmp_path_factory.mktemp("adapters") / "other.safetensors", seed=1, rank=2)


@pytest.fixture(scope="module")
def dylora(sd1, tmp_path_factory):
    return adapter_for(sd1, tmp_path_factory.mktemp("adapters") / "dial.safetensors", 2, 8, DyLora(2, "constant"))


@pytest.fixture(scope="module")
def plain(sd1, tmp_path_factory):
    """The image without adapters."""
    return draw(sd1, tmp_path_factory.mktemp("plain"), "--prompt", "a red disc")[0]


def by_diffusers(model, prompt, adapters=None, kind=StableDiffusionPipeline, **options):
    """The same image by diffusers' own pipeline."""
    pipe = kind.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler("ddim", "epsilon")
    for name, (file, _) in (adapters or {}).items():
        pipe.load_lora_weights(file, adapter_name=name)
    if adapters:
        pipe.set_adapters([*adapters], [weight for _, weight in adapters.values()])
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, **options}
    image = pipe(prompt, generator=torch.Generator().manual_seed(5), **options).images[0]
    return np.asarray(image, int)


def test_an_image_is_that_of_diffusers_pipeline(sd1, tmp_path):
    options = {"negative_prompt": "on white", "width": 72, "height": 64}
    mine = draw(sd1, tmp_path, "--prompt", "a red disc --n on white --w 72 --h 64")
    assert len(mine) == 1
    assert mine[0].shape == (64, 72, 3)
    assert differ(mine[0], by_diffusers(sd1, "a red disc", **options)) <= 1


def test_sdxl_is_that_of_diffusers_pipeline(sdxl, tmp_path):
    sizes = {"original_size": (96, 128), "crops_coords_top_left": (8, 16), "target_size": (64, 64)}
    negative = {"negative_original_size": (32, 40), "negative_target_size": (64, 64),
                "negative_crops_coords_top_left": (8, 16), "negative_prompt": "white"}  # fmt: skip
    line = "a red disc --n white --oh 96 --ow 128 --ct 8 --cl 16 --nh 32 --nw 40"
    mine = draw(sdxl, tmp_path / "a", "--prompt", line, "--sdxl", "--clip_skip", 2)[0]
    theirs = by_diffusers(sdxl, "a red disc", kind=StableDiffusionXLPipeline, **sizes, **negative)
    assert differ(mine, theirs) <= 1
    flags = ("--original_height", 96, "--original_width", 128, "--crop_top", 8, "--crop_left", 16)
    flags += ("--original_height_negative", 32, "--original_width_negative", 40)
    assert differ(mine, draw(sdxl, tmp_path / "b", "--prompt", "a red disc --n white", *flags)[0]) == 0
    assert differ(mine, draw(sdxl, tmp_path / "c", "--prompt", "a red disc --n white")[0]) > 1


def test_images_do_not_depend_on_their_batch(sd1, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("# three\na red disc --d 1,2\n\nblue --s 2 --d 3\na green square --n bad --d 4,5\n")
    options = ("--from_file", prompts, "--images_per_prompt", 2, "--sampler", "euler_a", "--sequential_file_name")
    alone = draw(sd1, tmp_path / "1", *options)
    assert len(alone) == 6
    for number, extra in enumerate((["--batch_size", 4], ["--batch_size", 4, "--vae_batch_size", 1],
                                    ["--batch_size", 3, "--vae_batch_size", 0.5])):  # fmt: skip
        together = draw(sd1, tmp_path / f"m{number}", *options, *extra)
        assert max(map(differ, alone, together)) <= 2


def test_adapters_live_folded_and_merged_are_the_same(sd1, lora, other, plain, tmp_path):
    options = ("--prompt", "a red disc", "--network_weights", lora, other, "--network_mul", 0.7, -0.4)
    options += ("--network_module", "networks.lora")
    live = draw(sd1, tmp_path / "live", *options)[0]
    wanted = by_diffusers(sd1, "a red disc", {"a": (lora, 0.7), "b": (other, -0.4)})
    assert differ(live, wanted) <= 1
    assert differ(live, plain) > 20
    for name in ("--network_merge", "--network_pre_calc", "--network_merge_n_models=1"):
        assert differ(draw(sd1, tmp_path / name, *options, name)[0], live) <= 1, name
    both = draw(sd1, tmp_path / "both", *options, "--network_merge_n_models", 1, "--network_pre_calc")[0]
    assert differ(both, live) <= 1


def test_weights_and_blocks_behind_the_files(sd1, lora, other, tmp_path):
    """As the file tools and A1111 read them."""
    options = ("--prompt", "a red disc", "--network_weights")
    wanted = draw(sd1, tmp_path / "mul", *options, lora, other, "--network_mul", 0.7, -0.4)[0]
    tags = f"<lora:{lora.with_suffix('')}:0.7> <lora:{other}:-0.4>"
    for number, words in enumerate(([f"{lora}:0.7", f"{other}:-0.4"], [tags])):
        assert differ(draw(sd1, tmp_path / str(number), *options, *words)[0], wanted) == 0
    part = weighted(Adapter.load(lora), parse("MIDD")).save(tmp_path / "part.safetensors")
    wanted = draw(sd1, tmp_path / "part", *options, part, "--network_mul", 0.7)[0]
    assert differ(draw(sd1, tmp_path / "lbw", *options, f"{lora}:0.7:lbw=MIDD")[0], wanted) <= 1
    assert differ(draw(sd1, tmp_path / "whole", *options, f"{lora}:0.7")[0], wanted) > 1


@pytest.mark.parametrize("way", ["live", "--network_pre_calc"])
def test_weights_in_the_prompt_line(sd1, lora, other, plain, tmp_path, way):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red disc --am 0.7,-0.4 --d 5\na red disc --am 0 --d 5\na red disc --d 5\n")
    options = ["--from_file", prompts, "--network_weights", lora, other, "--sequential_file_name", "--batch_size", 3]
    both, none, default = draw(sd1, tmp_path / "out", *options, *([way] if way != "live" else []))
    assert differ(both, by_diffusers(sd1, "a red disc", {"a": (lora, 0.7), "b": (other, -0.4)})) <= 1
    assert differ(none, plain) <= 1  # the last of --am stands for the rest
    assert differ(default, by_diffusers(sd1, "a red disc", {"a": (lora, 1.0), "b": (other, 1.0)})) <= 1


def test_weights_in_the_prompt_line_leave_merged_adapters_alone(sd1, lora, other, tmp_path):
    options = ("--network_weights", lora, other, "--network_mul", 0.7, "--network_merge_n_models", 1)
    mine = draw(sd1, tmp_path, "--prompt", "a red disc --am -0.4", *options)[0]
    assert differ(mine, by_diffusers(sd1, "a red disc", {"a": (lora, 0.7), "b": (other, -0.4)})) <= 1


@pytest.mark.parametrize("way", ["live", "--network_pre_calc", "--network_merge"])
def test_rank_is_the_adapter_cut_to_it(sd1, dylora, tmp_path, way):
    extra = [way] if way != "live" else []
    cut = tmp_path / "cut.safetensors"
    Adapter.load(dylora).truncate(4).save(cut)
    wanted = draw(sd1, tmp_path / "cut", "--prompt", "a red disc", "--network_weights", cut)[0]
    options = ("--prompt", "a red disc", "--network_weights", dylora, "--network_module", "networks.dylora")
    full = draw(sd1, tmp_path / "full", *options, *extra)[0]
    assert differ(full, wanted) > 5
    assert differ(draw(sd1, tmp_path / "flag", *options, "--rank", 4, *extra)[0], wanted) <= 1
    assert differ(draw(sd1, tmp_path / "args", *options, "--network_args", "rank=4", *extra)[0], wanted) <= 1
    if way != "--network_merge":
        line = ("--prompt", "a red disc --rank 4", *options[2:])
        assert differ(draw(sd1, tmp_path / "line", *line, "--rank", 8, *extra)[0], wanted) <= 1


@pytest.mark.parametrize("args", ["unit=2;rank_scaling=rank", "unit=2"])  # such a file is kohya's, cut at alpha/b
def test_a_file_that_does_not_say_so_is_a_dylora_by_its_module(args, sd1, lora, tmp_path):
    cut = tmp_path / "cut.safetensors"
    Adapter.load(lora).as_dylora(DyLora(2, "rank")).truncate(2).save(cut)
    wanted = draw(sd1, tmp_path / "cut", "--prompt", "a red disc", "--network_weights", cut)[0]
    options = ("--network_module", "networks.dylora", "--network_args", args, "--rank", 2)
    assert differ(draw(sd1, tmp_path / "out", "--prompt", "a red disc", "--network_weights", lora, *options)[0],
                  wanted) <= 1  # fmt: skip


def test_metadata_is_shown(sd1, dylora, tmp_path, capsys):
    draw(sd1, tmp_path, "--prompt", "x", "--network_weights", dylora, "--network_show_meta")
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") : shown.rindex("}") + 1])["ss_network_module"] == "networks.dylora"


def test_a_checkpoint_file_and_its_hash(sd1, plain, tmp_path):
    file = tmp_path / "tiny.safetensors"
    save_file(checkpoint(sd1), file)
    mine = draw(file, tmp_path / "out", "--prompt", "a red disc", "--model_config", sd1, "--v1")[0]
    assert differ(mine, plain) <= 1
    with Image.open(next((tmp_path / "out").iterdir())) as image:
        assert re.fullmatch("[0-9a-f]{10}", web_ui_reads(image.text["parameters"])["Model hash"])


def test_another_vae(sd1, plain, tmp_path):
    from tests.train.conftest import tiny_vae

    torch.manual_seed(9)
    tiny_vae().save_pretrained(tmp_path / "vae")
    options = ("--prompt", "a red disc", "--vae", tmp_path / "vae")
    assert differ(draw(sd1, tmp_path / "out", *options)[0], plain) > 5


@pytest.mark.parametrize("flags", [["--bf16"], ["--bf16", "--no_half_vae"], ["--opt_channels_last"], ["--sdpa"]])
def test_ways_to_compute_change_little(sd1, plain, tmp_path, flags):
    mine = draw(sd1, tmp_path, "--prompt", "a red disc", *flags)[0]
    assert np.abs(mine - plain).mean() < 6
    if "--bf16" in flags:
        assert differ(mine, plain) > 0
    else:
        assert differ(mine, plain) <= 1  # of 255: another order of the same sums


def test_precision_of_the_parts(sd1):
    from lora_adapters.train.generation.options import parse
    from lora_adapters.train.generation.run import load

    def types(*flags):
        models = load(parse(["--ckpt", str(sd1), *flags]), torch.device("cpu"))
        return [next(one.parameters()).dtype for one in (models.denoiser, models.text_encoders[0], models.vae)]

    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    assert types() == [single] * 3
    assert types("--bf16") == [brain] * 3
    assert types("--bf16", "--no_half_vae") == [brain, brain, single]
    assert types("--fp16") == [half, half, single]  # this VAE's config asks for it


def test_settings_that_change_the_image(sd1, plain, tmp_path):
    changes = {
        "clip_skip": ["--clip_skip", 2],
        "sampler": ["--sampler", "euler"],
        "scale": ["--scale", 6],
        "steps": ["--steps", 5],
        "seed": ["--seed", 6],
        "offset": ["--force_scheduler_zero_steps_offset"],
        "zero": ["--v_parameterization", "--zero_terminal_snr"],
        "v": ["--v_parameterization"],
        "size": ["--W", 72, "--H", 72],
    }
    for name, flags in changes.items():
        mine = draw(sd1, tmp_path / name, "--prompt", "a red disc", *flags)[0]
        assert mine.shape != plain.shape or differ(mine, plain) > 0, name


def test_options_in_the_line_are_those_of_the_command_line(sd1, tmp_path):
    flags = ("--W", 72, "--H", 80, "--steps", 4, "--scale", 5, "--sampler", "euler", "--seed", 9)
    by_flags = draw(sd1, tmp_path / "a", "--prompt", "a red disc", *flags)[0]
    by_line = draw(sd1, tmp_path / "b", "--prompt", "a red disc --w 72 --h 80 --s 4 --l 5 --ss euler --d 9")[0]
    assert differ(by_flags, by_line) == 0


def test_the_settings_are_in_the_image(sd1, lora, dylora, tmp_path):
    options = ("--network_weights", lora, dylora, "--network_mul", 0.5, "--rank", 4, "--clip_skip", 2, "--vae", sd1)
    draw(sd1, tmp_path, "--prompt", "a (red:1.2) disc, round --n bad, 坏 --am 0.25,-1 --ss k_euler_a", *options)
    with Image.open(next(tmp_path.iterdir())) as image:
        found = web_ui_reads(image.text["parameters"])
    hashes = {
        name: Adapter.load(file).metadata["sshs_model_hash"][:12] for name, file in (("one", lora), ("dial", dylora))
    }
    assert found == {
        "Prompt": "a (red:1.2) disc, round <lora:one:0.25> <lora:dial:-1>",
        "Negative prompt": "bad, 坏",
        "Steps": "3",
        "Sampler": "Euler a",
        "CFG scale": "3",
        "Seed": "5",
        "Size": "64x64",
        "Model": "sd1",
        "VAE": "sd1",
        "Clip skip": "2",
        "Lora hashes": f"one: {hashes['one']}, dial: {hashes['dial']}",
        "Lora ranks": "dial: 4",
        "Version": found["Version"],
    }


def test_from_images(sd1, tmp_path):
    start = Image.new("RGB", (90, 61), (200, 40, 40))
    start.save(tmp_path / "start.png")
    options = ("--image_path", tmp_path / "start.png", "--prompt", "a blue disc")
    weak, strong = (draw(sd1, tmp_path / f"{s}", *options, "--strength", s, "--steps", 20)[0] for s in (0.1, 1.0))
    assert weak.shape == (64, 88, 3)  # the nearest multiples of 8
    same = draw(sd1, tmp_path / "line", "--image_path", options[1], "--prompt", "a blue disc --t 0.1 --s 20")[0]
    assert differ(weak, same) == 0
    assert np.abs(weak - strong).mean() > 1
    assert draw(sd1, tmp_path / "size", *options, "--W", 48, "--H", 72)[0].shape == (72, 48, 3)
    assert draw(sd1, tmp_path / "l", *options[:2], "--prompt", "x --w 48 --h 72")[0].shape == (72, 48, 3)


def test_an_initial_image_is_encoded_as_diffusers_does(sd1, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    pixels_in = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels_in).save(tmp_path / "start.png")
    mine = draw(sd1, tmp_path / "out", "--image_path", tmp_path / "start.png", "--prompt", "a disc --t 0.7")[0]
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sd1)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(Image.fromarray(pixels_in))).latent_dist
    theirs = pipe("a disc", image=posterior.mean * pipe.vae.config.scaling_factor, strength=0.7, num_inference_steps=3,
                  guidance_scale=3.0, generator=torch.Generator().manual_seed(5)).images[0]  # fmt: skip
    assert differ(mine, np.asarray(theirs, int)) <= 1


def test_sdxl_from_an_image(sdxl, tmp_path):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "start.png")
    options = ("--image_path", tmp_path / "start.png", "--prompt", "a disc")
    made = draw(sdxl, tmp_path / "a", *options)[0]
    assert differ(made, draw(sdxl, tmp_path / "b", *options, "--original_height", 32)[0]) > 0


def test_prompts_and_names_from_the_initial_images(sd1, tmp_path):
    folder = tmp_path / "first"
    draw(sd1, folder, "--prompt", "a red disc --n bad --f one")
    again = tmp_path / "again"
    draw(sd1, again, "--image_path", folder, "--use_original_file_name")
    with Image.open(again / "one.png") as image:
        found = web_ui_reads(image.text["parameters"])
    assert (found["Prompt"], found["Negative prompt"]) == ("a red disc", "bad")
    assert found["Denoising strength"] == "0.8"


def test_file_names(sd1, tmp_path):
    draw(sd1, tmp_path / "a", "--prompt", "x", "--images_per_prompt", 2, "--sequential_file_name")
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["im_000001.png", "im_000002.png"]
    draw(sd1, tmp_path / "b", "--prompt", "x --f own.jpg", "--images_per_prompt", 2)
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["own-2.jpg", "own.jpg"]
    draw(sd1, tmp_path / "c", "--prompt", "x --d 7,9 --s 1", "--images_per_prompt", 2)
    found = sorted(file.name for file in (tmp_path / "c").iterdir())
    assert [re.sub(r"_\d{14}_", "_", name) for name in found] == ["im_000_7.png", "im_001_9.png"]


def test_a_sheet_of_settings(sd1, dylora, plain, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red disc --d 5\na blue square --d 6\n")
    common = ("--network_weights", dylora, "--network_mul", 0.5)
    sheet = tmp_path / "made" / "sheet.png"
    options = ("--sweep", "weight=0,2", "rank=4,8", "--sheet", sheet)
    assert main(["--ckpt", str(sd1), "--steps", "3", "--scale", "3", "--outdir", str(tmp_path / "none"),
                 "--from_file", str(prompts), *map(str, (*common, *options))]) == 0  # fmt: skip
    assert not (tmp_path / "none").exists()
    with Image.open(sheet) as image:
        assert image.text["parameters"].startswith("a red disc")
        assert web_ui_reads(image.text["parameters"])["Sweep"] == "weight=0,2 rank=4,8"
        rows = [image.height - 264 + at for at in (0, 132)]
        boxes = [[(image.width - 132 * n, top, image.width - 132 * n + 128, top + 128) for n in (3, 2, 1)]
                 for top in rows]  # fmt: skip
        cells = [[np.asarray(image.crop(box), int) for box in row] for row in boxes]
    one = draw(sd1, tmp_path / "one", "--prompt", "a blue square --d 6 --am 1 --rank 4", *common)[0]
    shown = np.asarray(Image.fromarray(one.astype(np.uint8)).resize((128, 128), Image.Resampling.BICUBIC), int)
    assert differ(cells[1][1], shown) <= 1
    before = np.asarray(Image.fromarray(plain.astype(np.uint8)).resize((128, 128), Image.Resampling.BICUBIC), int)
    assert differ(cells[0][0], before) <= 1
    assert differ(cells[0][1], cells[0][2]) > 5


def test_samplers_and_steps_can_be_swept_without_adapters(sd1, tmp_path):
    draw(sd1, tmp_path, "--prompt", "x", "--sweep", "sampler=ddim,euler", "steps=1,2", "scale=1")
    assert [file.name.startswith("sweep_") for file in tmp_path.iterdir()] == [True]
    assert pixels(next(tmp_path.iterdir())).shape[1] == 128 + 4 * 132
