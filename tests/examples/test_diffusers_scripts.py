"""Training scripts of diffusers with another LoraConfig: a stand-in for all, diffusers' own where they are at hand.

LORA_ADAPTERS_DIFFUSERS_EXAMPLES=<a checkout of diffusers>/examples runs the latter (slow, needs torchvision).
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from lora_adapters import Adapter, DyLoraConfig, set_rank
from tests.examples import stand_in

ROOT = Path(__file__).parent.parent.parent
WRAPPER = ROOT / "examples" / "diffusers_text_to_image" / "run_with_lora_adapters.py"
GOLDEN = ROOT / "tests" / "golden" / "sd15"
IMAGES = ROOT / "examples" / "images" / "delft" / "train"
EXAMPLES = os.environ.get("LORA_ADAPTERS_DIFFUSERS_EXAMPLES")
theirs = pytest.mark.skipif(
    not EXAMPLES or find_spec("torchvision") is None,
    reason="LORA_ADAPTERS_DIFFUSERS_EXAMPLES is not set, or there is no torchvision",
)

STOCK = """
import sys
sys.modules["lora_adapters"] = None  # an import of it would fail
import json
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
import torch
model, weights, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
pipe.load_lora_weights(weights, weight_name="pytorch_lora_weights.safetensors")
{body}
"""


def run(*arguments, ok=True):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    at = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=at, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    "options",
    [
        ("c3lier", "--conv_dim", "2", "--conv_alpha", "3"),
        ("dylora", "--unit", "2", "--conv_dim", "2", "--rank_sampling", "uniform"),
        ("lierla",),
        ("c3lier", "--keep_target_modules"),
    ],
    ids=" ".join,
)
def test_a_script_like_theirs(options, tmp_path) -> None:
    run(WRAPPER, stand_in.__file__, "--adapter", *options, "--", "--model", GOLDEN, "--output_dir", tmp_path)
    results = load_file(tmp_path / "outputs")
    torch.testing.assert_close(results["resumed"], results["trained"], rtol=0, atol=1e-6)

    adapter = Adapter.load(tmp_path)
    kinds = {("conv" if one.kernel != (1, 1) else "linear", one.rank, one.alpha) for one in adapter.modules.values()}
    wanted = {"c3lier": {("linear", 4, 4.0), ("conv", 2, 3.0)}, "dylora": {("linear", 4, 4.0), ("conv", 2, 1.0)}}
    kept = "--keep_target_modules" in options
    assert kinds == ({("linear", 4, 4.0)} if kept else wanted.get(options[0], {("linear", 4, 4.0)}))
    like = Adapter.load(GOLDEN / ("lierla.safetensors" if options[0] == "lierla" else "c3lier.safetensors"))
    count = sum(module.component == "unet" for module in like.modules)
    assert len(adapter.modules) == (128 if kept else count)

    unet = UNet2DConditionModel.from_pretrained(GOLDEN, subfolder="unet")
    pipe = StableDiffusionPipeline(None, None, None, unet, None, None, None, requires_safety_checker=False)
    base = stand_in.output(unet)
    assert (base - results["trained"]).abs().max() > 1e-3
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(stand_in.output(unet), results["trained"], rtol=0, atol=1e-5)
    assert isinstance(unet.peft_config["default_0"], DyLoraConfig) is (options[0] == "dylora")
    if options[0] == "dylora":
        assert adapter.dylora.unit == 2
        assert adapter.dylora.rank_sampling == "uniform"
        set_rank(pipe, 2)
        assert (stand_in.output(unet) - results["trained"]).abs().max() > 1e-4


def test_plain_diffusers_reads_what_the_script_saved(tmp_path) -> None:
    options = ("--adapter", "dylora", "--unit", "2", "--conv_dim", "2")
    run(WRAPPER, stand_in.__file__, *options, "--", "--model", GOLDEN, "--output_dir", tmp_path)
    body = "sys.path.insert(0, %r)\nfrom tests.examples import stand_in\nsave_file({'o': stand_in.output(unet)}, out)"
    script = f"""
import sys
sys.modules["lora_adapters"] = None
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
model, weights, out = sys.argv[1:]
unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
pipe = StableDiffusionPipeline(None, None, None, unet, None, None, None, requires_safety_checker=False)
pipe.load_lora_weights(weights, weight_name="pytorch_lora_weights.safetensors")
{body % str(ROOT)}
"""
    run("-c", script, GOLDEN, tmp_path, tmp_path / "stock")
    found, wanted = load_file(tmp_path / "stock")["o"], load_file(tmp_path / "outputs")["trained"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no_such.py"], "error: no_such.py: No such file or directory"),
        ([Path(__file__).parent / "__init__.py"], "does not say `from peft import LoraConfig`: nothing to replace"),
        ([stand_in.__file__, "--adapter", "c3lier", "--unit", "2"], "--unit is for --adapter dylora"),
        ([stand_in.__file__, "--adapter", "dora"], "invalid choice: 'dora'"),
    ],
)
def test_what_is_said(arguments, line) -> None:
    done = run(WRAPPER, *arguments, ok=False)
    assert line in done.stderr
    assert "Traceback" not in done.stderr


# --- diffusers' own scripts -----------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """A folder of images with captions as the text-to-image scripts want it."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for file in sorted(IMAGES.glob("*.png"))[:6]:
        shutil.copy(file, folder)
        rows.append({"file_name": file.name, "text": file.with_suffix(".txt").read_text().strip()})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def common(model, output, steps):
    return [
        *("--pretrained_model_name_or_path", model, "--output_dir", output, "--resolution", 64, "--rank", 4),
        *("--train_batch_size", 2, "--learning_rate", 1e-3, "--lr_warmup_steps", 0, "--seed", 1),
        *("--max_train_steps", steps, "--checkpointing_steps", 2),
    ]


def script_run(script, adapter, arguments, **kwargs):
    return run(WRAPPER, Path(EXAMPLES) / script, *adapter, "--", *arguments, **kwargs)


def check(pipe_class, model, output, tmp_path, dylora, trained):
    """Loaded here, and without this package, the file does the same; a resumed run went on from its checkpoint."""
    file = output / "pytorch_lora_weights.safetensors"
    adapter = Adapter.load(file)
    assert (adapter.dylora is not None) is dylora
    assert set(adapter.components) == set(trained)
    if dylora:
        assert adapter.dylora.unit == 2
        assert adapter.dylora.rank_sampling == "uniform"
    with safe_open(file, "pt") as opened:
        assert all(f"{part}.lora_alpha" in json.loads(opened.metadata()["lora_adapter_metadata"]) for part in trained)
    before = Adapter.load(output / "checkpoint-2")
    moved = max((one.down - before.modules[m].down).abs().max().item() for m, one in adapter.modules.items())
    assert 0 < moved < 1e-2  # a few steps of 1e-3, where a new start would be some 0.25 away
    assert max(one.up.abs().max().item() for one in adapter.modules.values()) > 1e-4

    arguments = "'a blue bird', num_inference_steps=2, output_type='latent', height=64, width=64"
    body = f"save_file({{'o': pipe({arguments}, generator=torch.Generator().manual_seed(0)).images}}, out)"
    run("-c", STOCK.format(body=body), model, output, tmp_path / "stock")
    pipe = pipe_class.from_pretrained(model, torch_dtype=torch.float32)
    options = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64}

    def image():
        return pipe("a blue bird", generator=torch.Generator().manual_seed(0), **options).images

    base = image()
    pipe.load_lora_weights(output)
    stock = load_file(tmp_path / "stock")["o"]
    assert (stock - base).abs().max() > 1e-4
    torch.testing.assert_close(image(), stock, rtol=0, atol=1e-3)


C3LIER = ("--adapter", "c3lier", "--conv_dim", 2)
DYLORA = ("--adapter", "dylora", "--unit", 2, "--conv_dim", 2, "--rank_sampling", "uniform")


@theirs
@pytest.mark.slow
@pytest.mark.parametrize("adapter", [C3LIER, DYLORA], ids=["c3lier", "dylora"])
def test_text_to_image(adapter, images, tmp_path) -> None:
    model, output, script = ROOT / "examples" / "tiny-sd", tmp_path / "out", "text_to_image/train_text_to_image_lora.py"
    data = ["--train_data_dir", images, "--gradient_checkpointing"]
    script_run(script, adapter, [*common(model, output, 2), *data])
    again = ["--resume_from_checkpoint", "latest", "--validation_prompt", "a blue bird", "--num_validation_images", 1]
    done = script_run(script, adapter, [*common(model, output, 4), *data, *again])
    assert "Resuming from checkpoint checkpoint-2" in done.stdout
    assert "unexpected keys" not in done.stderr
    check(StableDiffusionPipeline, model, output, tmp_path, adapter is DYLORA, ("unet",))


@theirs
@pytest.mark.slow
@pytest.mark.parametrize("adapter", [C3LIER, DYLORA], ids=["c3lier", "dylora"])
def test_text_to_image_sdxl(adapter, images, tmp_path) -> None:
    from tests.train.conftest import build_sdxl

    model, output = build_sdxl(tmp_path / "sdxl"), tmp_path / "out"
    script = "text_to_image/train_text_to_image_lora_sdxl.py"
    data = ["--train_data_dir", images, "--train_text_encoder"]
    script_run(script, adapter, [*common(model, output, 2), *data])
    done = script_run(script, adapter, [*common(model, output, 4), *data, "--resume_from_checkpoint", "latest"])
    assert "Resuming from checkpoint checkpoint-2" in done.stdout
    assert "unexpected keys" not in done.stderr
    parts = ("unet", "text_encoder", "text_encoder_2")
    check(StableDiffusionXLPipeline, model, output, tmp_path, adapter is DYLORA, parts)


@theirs
@pytest.mark.slow
@pytest.mark.parametrize("adapter", [C3LIER, DYLORA], ids=["c3lier", "dylora"])
def test_dreambooth(adapter, images, tmp_path) -> None:
    (images / "metadata.jsonl").unlink()
    model, output, script = ROOT / "examples" / "tiny-sd", tmp_path / "out", "dreambooth/train_dreambooth_lora.py"
    data = ["--instance_data_dir", images, "--instance_prompt", "a delft tile", "--train_text_encoder"]
    script_run(script, adapter, [*common(model, output, 2), *data])
    done = script_run(script, adapter, [*common(model, output, 4), *data, "--resume_from_checkpoint", "latest"])
    assert "Resuming from checkpoint checkpoint-2" in done.stdout
    assert "unexpected keys" not in done.stderr
    check(StableDiffusionPipeline, model, output, tmp_path, adapter is DYLORA, ("unet", "text_encoder"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import no_such_package.part", "needs the package no_such_package: pip install no_such_package"),
        ("from diffusers.utils import check_min_version; check_min_version('99.0')", "the version found is "),
    ],
)
def test_what_a_script_lacks_is_said_in_one_line(tmp_path, line, reason):
    script = tmp_path / "script.py"
    script.write_text(f"from peft import LoraConfig\n{line}\n")
    said = run(WRAPPER, script, "--adapter", "lierla", "--", ok=False).stderr.strip().splitlines()[-1]
    assert said.startswith(f"error: {script}")
    assert reason in said
