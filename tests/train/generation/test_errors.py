"""What cannot be done is told in one line, before a model is loaded where it can be."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.train.gen_img_diffusers import main
from lora_adapters.train.generation import options as generate_options
from lora_adapters.train.generation import run
from lora_adapters.train.generation.refused import RefusedOptions
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.unsupported import unsupported
from tests.train.generating import adapter_for


@pytest.fixture(scope="module")
def files(sd1, sdxl, tmp_path_factory):
    """Adapters and images by name."""
    folder = tmp_path_factory.mktemp("files")
    adapter_for(sd1, folder / "lora.safetensors")
    adapter_for(sd1, folder / "dial.safetensors", 1, 8, DyLora(4, "constant"))
    adapter_for(sdxl, folder / "xl.safetensors")
    Image.new("RGB", (64, 64)).save(folder / "image.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "broken.safetensors").write_bytes(b"no")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""

    def load(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run, "load_base_models", load)


def error(capsys, *options: object, status: int = 1) -> str:
    assert main([*map(str, options)]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


WRONG_USAGE = {
    "": "--ckpt is missing",
    "--ckpt {sd1}": "there is no prompt: give --prompt or --from_file",
    "--frames 3": "unrecognized arguments: --frames 3",
    "--ckpt {sd1} --prompt x --sampler fast": "invalid choice: 'fast'",
    "--ckpt {sd1} --prompt x --from_file y": "--prompt and --from_file exclude each other",
    "--ckpt {sd1} --prompt x --v1 --sdxl": "--v1 and --v2 and --sdxl exclude each other",
    "--ckpt {sd1} --prompt x --fp16 --bf16": "--fp16 and --bf16 exclude each other",
    "--ckpt {sd1} --prompt x --images_per_prompt 0": "--images_per_prompt 0: give 1 or more",
    "--ckpt {sd1} --prompt x --batch_size -1": "--batch_size -1: give 1 or more",
    "--ckpt {sd1} --prompt x --n_iter 0": "--n_iter 0: give 1 or more",
    "--ckpt {sd1} --prompt x --clip_skip 0": "--clip_skip 0: give 1 or more",
    "--ckpt {sd1} --prompt x --max_embeddings_multiples 0": "--max_embeddings_multiples 0",
    "--ckpt {sd1} --prompt x --vae_batch_size 0": "--vae_batch_size 0.0: give more than 0",
    "--ckpt {sd1} --prompt x --seed -1": "--seed -1: seeds are 0 to 4294967295",
    "--ckpt {sd1} --prompt x --scale nan": "argument --scale: invalid number value: 'nan'",
    "--ckpt {sd1} --prompt x --strength 0": "--strength is for --image_path",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_merge --network_pre_calc": "exclude each other",
    "--ckpt {sd1} --prompt x --sweep steps=1 --sequential_file_name": "--sweep and --sequential_file_name exclude",
    "--ckpt {sd1} --prompt x --strength 0.5": "--strength is for --image_path",
    "--ckpt {sd1} --prompt x --use_original_file_name": "--use_original_file_name is for --image_path",
    "--ckpt {sd1} --prompt x --sheet a.png": "--sheet is for --sweep",
    "--ckpt {sd1} --prompt x --sheet_font a.ttf": "--sheet_font is for --sweep",
    "--ckpt {sd1} --prompt x --sweep steps=1 --sheet a.jpg": "must end in .png",
    "--ckpt {sd1} --prompt x --network_mul 0.5": "--network_mul needs --network_weights",
    "--ckpt {sd1} --prompt x --network_module networks.lora": "--network_module needs --network_weights",
    "--ckpt {sd1} --prompt x --network_merge": "--network_merge needs --network_weights",
    "--ckpt {sd1} --prompt x --network_pre_calc": "--network_pre_calc needs --network_weights",
    "--ckpt {sd1} --prompt x --rank 4": "--rank needs --network_weights",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_module networks.oft": "networks.oft is not supported",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_module a b": "--network_module has 2 values for 1",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_mul 1 2": "--network_mul has 2 values for 1",
    "--ckpt {sd1} --prompt x --network_weights {lora}:0.5 --network_mul 1": "has two weights, one after its name",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_mul inf": "--network_mul: invalid number value: 'inf'",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_args conv_dim=4": "--network_args conv_dim=4 for",
    "--ckpt {sd1} --prompt x --network_weights {dial} --network_args rank": "'rank' is not of the form key=value",
    "--ckpt {sd1} --prompt x --network_weights {dial} --network_args rank=0": "rank=0 for",
    "--ckpt {sd1} --prompt x --network_weights {dial} --network_args rank_scaling=x": "rank_scaling=x: not one of",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_merge_n_models 2": "only 1 --network_weights are given",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_merge --network_merge_n_models 1": "exclude each other",
    "--ckpt {sd1} --prompt x --sweep colour=red": "names are weight, rank, steps, scale, sampler",
    "--ckpt {sd1} --prompt x --sweep steps": "--sweep: 'steps' is not of the form key=value",
    "--ckpt {sd1} --prompt x --sweep steps=1,b": "--sweep steps=1,b: it takes values",
    "--ckpt {sd1} --prompt x --sweep steps=0": "--sweep steps: give 1 to 1000",
    "--ckpt {sd1} --prompt x --sweep scale=inf": "--sweep scale=inf",
    "--ckpt {sd1} --prompt x --sweep steps=1 steps=2": "steps is given twice",
}

EARLY = {
    "--ckpt nowhere.safetensors --prompt x": "base model nowhere.safetensors does not exist",
    "--ckpt {files} --prompt x": "is not a Diffusers model",
    "--ckpt {sd1} --prompt x --steps 0": "--prompt: 0 steps: give 1 to 1000",
    "--ckpt {sd1} --prompt x --sweep steps=1 --sheet_font {files}/image.png": "is not a TrueType or OpenType font",
    "--ckpt {sd1} --prompt x --outdir {files}/image.png": "is not a folder",
    "--ckpt {sd1} --prompt x --device cuda:99": "device cuda:99 cannot be used",
    "--ckpt {sd1} --prompt x --sampler pndm --zero_terminal_snr": "sampler pndm does not support --zero_terminal_snr",
    "--ckpt {sd1} --prompt x --crop_top 8": "--ct (crop_top) is for SDXL, which the model is not",
    "--ckpt {sdxl} --prompt x --clip_skip 1": "--clip_skip 1: SDXL was trained with 2",
    # initial images
    "--ckpt {sd1} --prompt x --image_path nowhere.png": "--image_path nowhere.png does not exist",
    "--ckpt {sd1} --prompt x --image_path {files}/empty": "empty has no images",
    "--ckpt {sd1} --prompt x --image_path {files}/broken.png": "broken.png: not in an image format",
    "--ckpt {sd1} --image_path {files}/image.png": "image.png contains no prompt: give --prompt",
    "--ckpt {sd1} --prompt x --image_path {files}/image.png --strength 0": "strength 0.0 must be above 0",
    "--ckpt {sd1} --prompt x --image_path {files}/image.png --strength 0.01": "strength 0.01 leaves no steps of 50",
    "--ckpt {sd1} --prompt x --image_path {files}/image.png --W 64": "only one of width and height is given",
    # adapters
    "--ckpt {sd1} --prompt x --network_weights nowhere.safetensors": "nowhere.safetensors does not exist",
    "--ckpt {sd1} --prompt x --network_weights {files}/broken.safetensors": "truncated or not a safetensors file",
    "--ckpt {sd1} --prompt x --network_weights {lora}:1:lbw=IN99": "IN99 is not a block or preset",
    "--ckpt {sd1} --prompt x --network_weights {dial} --rank 5": "the adapter cannot be truncated to rank 5",
    "--ckpt {sd1} --prompt x --network_weights {lora} --rank 4": "none of --network_weights is a DyLoRA",
    "--ckpt {sd1} --prompt x --network_weights {xl}": "xl.safetensors is for SDXL, but",
    "--ckpt {sdxl} --prompt x --network_weights {lora}": "lora.safetensors is for SD, but",
    "--ckpt owner/name --prompt x --network_weights {lora} {xl}": "cannot be combined",
    # sweeps
    "--ckpt {sd1} --prompt x --sweep weight=1": "--sweep weight: there is no adapter to change",
    "--ckpt {sd1} --prompt x --network_weights {lora} --network_merge --sweep weight=1": "no adapter to change",
    "--ckpt {sd1} --prompt x --network_weights {lora} --sweep rank=4": "no adapter that is not merged is a DyLoRA",
    "--ckpt {sd1} --prompt x --network_weights {dial} --sweep rank=4,5": "cannot be truncated to rank 5",
    "--ckpt {sd1} --prompt x --sweep sampler=fast": "unknown sampler fast",
}


@pytest.mark.parametrize("options", [*WRONG_USAGE, *EARLY])
def test_before_the_model_is_loaded(files, sd1, sdxl, capsys, unloaded, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    places = {name: files / f"{name}.safetensors" for name in ("lora", "dial", "xl")}
    given = [part.format(sd1=sd1, sdxl=sdxl, files=files, **places) for part in options.split()]
    message, status = (WRONG_USAGE[options], 2) if options in WRONG_USAGE else (EARLY[options], 1)
    assert message in error(capsys, *given, status=status)
    assert not [*tmp_path.iterdir()]


LINES = {
    "a --w": "--w has no value; it takes a whole number",
    "a --w big": "--w big: it takes a whole number",
    "a --d 1,x": "--d 1,x: it takes seeds",
    "a --d 1,2": "--d has 2 seeds for --images_per_prompt 1",
    "a --d 4294967296": "seeds must be below 4294967296",
    "a --s 0": "0 steps",
    "a --l high": "--l high: it takes a number",
    "a --t 0.5": "--t (strength) is for --image_path",
    "a --am x": "--am x: it takes numbers",
    "a --am 1": "--am has 1 for 0 adapters",
    "a --rank 4": "no adapter that is not merged is a DyLoRA",
    "a --ow 64": "--ow (original_width) is for SDXL",
    "a --ss fast": "unknown sampler fast",
    "a --f ../up": "--f ../up is outside --outdir",
    "a --f /up": "is outside --outdir",
    "a --f up.gif": "must end in one of .png, .jpg, .jpeg, .webp",
    "a --q 1": "--q in 'a --q 1' is not one of --n, --w",
    "--n only bad": "there is no prompt",
    "a {red|blue} hat": "choices like {a|b} are not supported",
    "a --nl 3": "--nl (a scale of its own for the negative prompt is not supported)",
    "a --c cat": "--c (guidance by CLIP or VGG16 is not supported)",
    "a --dsd1 3": "--dsd1 (Deep Shrink is not supported)",
    "a --glt 650": "--glt (Gradual Latent is not supported)",
}


@pytest.mark.parametrize("line", LINES)
def test_wrong_lines_have_their_number(sd1, capsys, unloaded, tmp_path, line):
    file = tmp_path / "prompts.txt"
    file.write_text(f"# a comment\n\na red disc\n{line}\n")
    message = error(capsys, "--ckpt", sd1, "--from_file", file)
    assert f"{file}, line 4: " in message
    assert LINES[line] in message


def test_wrong_prompt_files(sd1, capsys, unloaded, tmp_path):
    assert "cannot be read" in error(capsys, "--ckpt", sd1, "--from_file", tmp_path / "none.txt")
    (tmp_path / "p.txt").write_text("# nothing\n")
    assert "has no prompts" in error(capsys, "--ckpt", sd1, "--from_file", tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("a --f x\nb --f x\n")
    assert "p.txt, line 2: the name x is taken already" in error(
        capsys, "--ckpt", sd1, "--from_file", tmp_path / "p.txt"
    )
    (tmp_path / "p.txt").write_text("a\nb --s 3\n")
    options = ("--ckpt", sd1, "--from_file", tmp_path / "p.txt", "--sweep", "steps=1,2")
    assert "p.txt, line 2: steps is also set by --sweep steps" in error(capsys, *options)
    (tmp_path / "p.txt").write_text("a\nb --f b.png\n")
    assert "p.txt, line 2: --f names an image, but --sweep writes one sheet" in error(capsys, *options)


@pytest.mark.parametrize("name", unsupported(generate_options.GenerateSettings))
def test_unsupported_options_say_so(sd1, capsys, unloaded, name):
    message = error(capsys, "--ckpt", sd1, "--prompt", "x", f"--{name}", "1", status=2)
    assert message.startswith(f"error: --{name}: ")
    assert error(capsys, "--ckpt", sd1, "--prompt", "x", f"--{name}", status=2) == message


def test_every_supported_option_is_read():
    """No option is accepted and then ignored: each one's value is asked for somewhere."""
    folder = Path(generate_options.__file__).parents[1]
    names = (
        "generation/run generation/plan generation/draw generation/networks generation/requests "
        "generation/output generation/sweeps models/base models/loading models/sd models/sdxl "
        "models/part_files models/transformer"
    )
    code = "".join((folder / f"{name}.py").read_text() for name in names.split())
    made = generate_options.parser()
    others = ("help", argparse.SUPPRESS, *unsupported(generate_options.GenerateSettings))
    supported = [action.dest for action in made._actions if action.dest not in others]
    unread = [dest for dest in supported if not re.search(rf"settings\.{dest}\b|\"{dest}\"|'{dest}'", code)]
    assert unread == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--v2", "--v2 is for SD2.x; {sdxl} is SDXL"),
        ("--v1", "--v1: {sdxl} is sdxl"),
        ("--zero_terminal_snr", "--zero_terminal_snr is for models that predict v, which {sdxl} does not"),
        ("--vae nowhere/there", "--vae nowhere/there cannot be loaded"),
    ],
)
def test_what_only_the_model_can_tell(sdxl, capsys, tmp_path, options, message):
    got = error(capsys, "--ckpt", sdxl, "--prompt", "x", "--outdir", tmp_path / "out", *options.split())
    assert message.format(sdxl=sdxl) in got
    assert not (tmp_path / "out").exists()


def test_more_of_it(sd1, files, capsys, tmp_path):
    common = ("--ckpt", sd1, "--prompt", "x", "--outdir", tmp_path / "out")
    assert "--clip_skip 9: the text encoder has 2 layers" in error(capsys, *common, "--clip_skip", 9)
    assert "--sdxl: " in error(capsys, *common, "--sdxl")
    wide = files / "wide.safetensors"
    from lora_adapters.adapter import Adapter
    from lora_adapters.convert.deltas.low_rank import LowRank

    Adapter.load(files / "lora.safetensors").map(lambda one: LowRank(torch.ones(1, 7), torch.ones(9, 1), 1.0)).save(
        wide
    )
    for way in ((), ("--network_merge",), ("--network_pre_calc",)):
        message = error(capsys, *common, "--network_weights", wide, *way)
        assert f"error: {wide}: " in message
        assert "made for a weight of [9, 7], but the model's weight is" in message
    assert not (tmp_path / "out").exists()


def test_a_repository_that_is_not_there(hub, sd1, capsys):
    missing = "the Hub has no repository owner/name, or it is private"
    message = error(capsys, "--ckpt", "owner/name", "--prompt", "x")
    assert f"owner/name cannot be loaded: there is no local file or folder of this name, and {missing}" in message
    assert missing in error(capsys, "--ckpt", sd1, "--prompt", "x", "--network_weights", "owner/name")


def test_xformers_needs_cuda(sd1, capsys, unloaded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flag in ("--xformers", "--diffusers_xformers"):
        assert "--xformers needs a CUDA device" in error(capsys, "--ckpt", sd1, "--prompt", "x", flag)
    both = ("--ckpt", sd1, "--prompt", "x", "--xformers", "--sdpa")
    assert "one of --xformers and --sdpa" in error(capsys, *both, status=2)


def test_xformers_is_switched_on(sd1, monkeypatch):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    called = []
    for kind in (AutoencoderKL, UNet2DConditionModel):
        name = "enable_xformers_memory_efficient_attention"
        monkeypatch.setattr(kind, name, lambda self, kind=kind: called.append(kind))
    for flag in ("--xformers", "--diffusers_xformers"):
        settings = generate_options.parse(["--ckpt", str(sd1), flag])
        run.load(settings, torch.device("cpu"))
    assert set(called) == {AutoencoderKL, UNet2DConditionModel}
    assert len(called) == 4


def test_images_that_are_no_numbers(sd1, capsys, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, z: argparse.Namespace(sample=decode(self, z).sample * float("nan"))
    )
    message = error(capsys, "--ckpt", sd1, "--prompt", "x", "--steps", 1, "--outdir", tmp_path / "out")
    assert "contains NaN: try --no_half_vae" in message
    assert not (tmp_path / "out").exists()


def test_run_as_a_file(tmp_path):
    script = Path(generate_options.__file__).parents[1] / "gen_img_diffusers.py"
    done = subprocess.run(
        [sys.executable, str(script), "--ckpt", "nowhere.ckpt", "--prompt", "x"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: base model nowhere.ckpt does not exist\n"


def test_options_from_the_command_line():
    options = generate_options.parse(["--ckpt=m", "--images_per_p", "3", "--scale=7.5"])
    assert (options.pretrained_model_name_or_path, options.images_per_prompt, options.scale) == ("m", 3, 7.5)
    assert options.given == {"pretrained_model_name_or_path", "images_per_prompt", "scale"}
    said = " ".join(generate_options.parser().format_help().split())
    assert said.count("(default: ") == len(options_of(generate_options.GenerateSettings)) - len(
        options_of(RefusedOptions)
    )
