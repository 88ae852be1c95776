"""--quantize_base, on the CPU, for which bitsandbytes has kernels of its own."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import OneLineError
from lora_adapters.train.models.base import load_base_models
from lora_adapters.train.models.quantised import layers, quantise
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.activations import activation_bytes
from lora_adapters.train.training.dry_run import memory
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import prepare

from ..conftest import build_sdxl
from ..transformers import build_sd3

EXAMPLES = Path(__file__).parents[3] / "examples"
MODELS = {"sd": "tiny-sd", "flux": "tiny-flux"}


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install lora-adapters[8bit])")


@pytest.fixture(params=[pytest.param("sd", marks=pytest.mark.slow), "flux"])
def options(request, basics) -> dict:
    model = str(EXAMPLES / MODELS[request.param])
    return {**basics, "pretrained_model_name_or_path": model, "network_train_unet_only": True}


def dequantised(layer, bnb) -> torch.Tensor:
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * scales[:, None] / 127


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_step_is_that_of_the_dequantised_weights(options, bnb, kind) -> None:
    """8 bits round the layer's inputs as well, each row to 1/127 of its largest number."""
    run = prepare(settings(**options, quantize_base=kind))
    plain = prepare(settings(**options))
    quantised = {
        path: layer for path, layer in run.models.denoiser.named_modules() if layer in layers(run.models.denoiser)
    }
    assert len(quantised) > 20
    with torch.no_grad():
        for path, layer in quantised.items():
            own = plain.models.denoiser.get_submodule(path)
            change = (own.weight - dequantised(layer, bnb)).abs().max() / own.weight.abs().max()
            assert 0 < change < (0.2 if kind == "nf4" else 0.005)
            own.weight.copy_(dequantised(layer, bnb))
    losses, gradients = [], []
    for one in (run, plain):
        one.training_mode()
        losses.append(one.loss.training(next(one.data.batches(0))))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters]))
    tolerance = {"nf4": 1e-3, "int8": 0.03}[kind]
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0.0)
    assert (gradients[0] - gradients[1]).norm() < 3 * tolerance * gradients[1].norm()
    assert gradients[0].norm() > 0


@pytest.mark.parametrize(("kind", "module"), [("nf4", "networks.dylora"), ("int8", "networks.lora")])
def test_trained_with_less_memory_and_saved(options, bnb, kind, module) -> None:
    asked = settings(**options | {"network_module": module, "max_train_steps": 3}, quantize_base=kind)
    run, plain = prepare(asked), prepare(settings(**options))
    title = run.models.family.denoiser_title
    bits = sum(layer.in_features * layer.out_features for layer in layers(run.models.denoiser))
    saved = bits * (4 - 0.5 - 4 / 64) if kind == "nf4" else bits * (4 - 1)
    assert memory(plain)[title] - memory(run)[title] == pytest.approx(saved, rel=0.02)
    half = {"mixed_precision": "bf16", "network_module": module}
    pairs = (run, plain), (prepare(settings(**options | half, quantize_base=kind)), prepare(settings(**options | half)))
    for one, other in pairs:
        assert activation_bytes(one) == pytest.approx(activation_bytes(other), rel=0.05)
    trained = train(asked)
    file = Adapter.load(Path(options["output_dir"]) / "last.safetensors")
    assert file.metadata["ss_quantize_base"] == kind
    assert set(file.modules) == set(trained.adapter.modules)
    assert all(torch.isfinite(torch.tensor(trained.losses)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{"fp8_base": True, "gradient_checkpointing": True}, {"quantize_base": "nf4"}, {"quantize_base": "int8"}]
)
@pytest.mark.parametrize("build", [build_sd3, build_sdxl])
def test_sd3_and_sdxl_go_on_exactly_and_draw_samples(basics, tmp_path, build, more) -> None:
    if "quantize_base" in more:
        pytest.importorskip("bitsandbytes")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 1\n")
    options = {**basics, **more, "pretrained_model_name_or_path": str(build(tmp_path / "m")), "max_train_steps": 4}
    options |= {"network_train_unet_only": True, "save_state": True, "save_every_n_steps": 2}
    options |= {"sample_prompts": str(prompts), "sample_every_n_steps": 2}
    whole = train(settings(**options))
    state = Path(options["output_dir"]) / "at-step00000002-state"
    again = train(settings(**options | {"output_dir": str(tmp_path / "again"), "resume": str(state)}))
    assert again.losses == whole.losses[2:]
    one, other = (load_file(folder / "last.safetensors") for folder in (state.parent, tmp_path / "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert len(list((state.parent / "sample").glob("*.png"))) == 2


def test_only_linear_layers_that_the_kernel_takes(bnb) -> None:
    models = load_base_models(settings(pretrained_model_name_or_path=str(EXAMPLES / "tiny-flux")))
    quantise(models, "nf4", torch.float32, torch.device("cpu"))
    found = layers(models.denoiser)
    assert found
    assert all(layer.in_features % 64 == 0 for layer in found)
    assert type(models.denoiser.proj_out) is torch.nn.Linear


def test_a_model_without_such_layers(bnb, sd1) -> None:
    models = load_base_models(settings(pretrained_model_name_or_path=sd1))
    models.denoiser = torch.nn.Sequential(torch.nn.Linear(48, 64))
    with pytest.raises(OneLineError, match="no layer of the U-Net can be quantised"):
        quantise(models, "nf4", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"fp8_base": True}, "--quantize_base and --fp8_base exclude"),
        ({"network_module": "networks.loha"}, "--quantize_base works with LoRA, C3Lier and DyLoRA"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(basics, bnb, asked, said) -> None:
    with pytest.raises(OneLineError, match=said):
        prepare(settings(**basics | asked, quantize_base="nf4"))


def test_without_bitsandbytes(basics, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(OneLineError, match="bitsandbytes is not installed: pip install"):
        prepare(settings(**basics, quantize_base="nf4"))
