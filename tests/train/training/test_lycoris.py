"""LoHa, LoKr, DoRA and other kinds, trained: the loss falls, files open elsewhere and mean what was trained."""

import json
import logging
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_adapters.convert import Adapter
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.base import load_base_models
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training import adapters
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import prepare
from tests.train.training.test_learning import TINY, held_out, options

LYCORIS = {"network_module": "lycoris.kohya"}
KINDS = {
    "LoHa": {"network_module": "networks.loha", "network_alpha": 1, "network_args": {"conv_dim": 4}},
    "LoHa, Tucker, DoRA": {**LYCORIS, "network_args": {"algo": "loha", "use_tucker": True, "dora_wd": True}},
    "LoKr": {"network_module": "networks.lokr", "network_args": {"factor": 4, "conv_dim": 4}, "learning_rate": 3e-3},
    "LoKr, both, scalar": {
        **LYCORIS,
        "network_args": {"algo": "lokr", "decompose_both": True, "use_scalar": True},
        "learning_rate": 5e-3,
    },
    "LoRA, Tucker, norms": {**LYCORIS, "network_args": {"use_tucker": True, "train_norm": True}},
    "DoRA": {**LYCORIS, "network_args": {"algo": "locon", "dora_wd": True, "preset": "attn-mlp"}},
    "full": {**LYCORIS, "network_args": {"algo": "full"}, "learning_rate": 1e-4},
    "GLoRA": {**LYCORIS, "network_args": {"algo": "glora", "rs_lora": True}, "learning_rate": 5e-4},
    "IA3": {**LYCORIS, "network_args": {"algo": "ia3"}, "learning_rate": 3e-2},
    "OFT": {**LYCORIS, "network_args": {"algo": "diag-oft", "rescaled": True}, "learning_rate": 1e-3},
    "BOFT": {**LYCORIS, "network_dim": 8, "network_args": {"algo": "boft", "preset": "attn-mlp"}},
}
# LyCORIS cannot make its own modules of IA3's files, and makes something else of those of full changes.
READ_BY_LYCORIS = sorted(KINDS.keys() - {"IA3", "full"})


@torch.no_grad()
def outputs(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
    return unet(latents, 7, text).sample


def difference(got: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> float:
    """How far it is from what is expected, by how far that is from what was before."""
    change = float((expected - before).norm())
    assert change > 1e-4 * float(before.norm())
    return float((got - expected).norm()) / change


def in_lycoris(file: Path, unet) -> torch.Tensor:
    """What the U-Net computes with LyCORIS' own modules, made of a file."""
    from lycoris import kohya

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    # what it would train of the U-Net, before it looks at the file: with all classes, a U-Net of diffusers fails
    kohya.LycorisNetworkKohya.apply_preset({"unet_target_module": ["Transformer2DModel"], "unet_target_name": []})
    network, weights = kohya.create_network_from_weights(1.0, str(file), None, None, unet)
    network.apply_to(None, unet, False, True)
    missing, _ = network.load_state_dict(weights, strict=False)
    assert not missing
    assert len(network.unet_loras) == len({key.split(".")[0] for key in weights if key.startswith("lora_unet_")})
    return outputs(unet.eval())


def image_of(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    made = pipe("a red apple", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np")
    return torch.from_numpy(made.images[0])


SHORT = {
    "network_dim": 4,
    "network_alpha": 4,
    "network_train_unet_only": True,
    "cache_text_encoder_outputs": True,
    "max_train_steps": 20,
    "validate_every_n_steps": 1000,  # that is, before the first step and after the last
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_held_out_loss_falls_and_the_file_is_what_was_trained(tmp_path, kind, capsys) -> None:
    from lora_adapters.cli import main

    result = train(settings(**options(tmp_path, **{**SHORT, **KINDS[kind]})))
    (before,), (after,) = held_out(result, 0), held_out(result, result.steps)
    assert after < 0.97 * before, f"{before:.4f} to {after:.4f}"

    file = tmp_path / "out" / "x.safetensors"
    assert not main(["info", str(file)])
    shown = capsys.readouterr().out
    for found in Adapter.load(file).kinds:
        assert found in shown
    base = StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    if kind in READ_BY_LYCORIS and find_spec("lycoris"):
        live = outputs(result.models.denoiser.eval())
        assert difference(in_lycoris(file, deepcopy(base.unet)), live, outputs(base.unet)) < 1e-4
    trained = image_of(result.models.pipeline(base.scheduler))
    untrained = image_of(base)
    assert float((trained - untrained).abs().max()) > 0.02
    merged = Adapter.load(file).merge_into(tmp_path / "base", tmp_path / "merged")
    base.load_lora_weights(str(file))
    for pipe in (base, StableDiffusionPipeline.from_pretrained(merged, torch_dtype=torch.float32)):
        assert float((image_of(pipe) - trained).abs().max()) < 2e-3


MIXED = {
    **LYCORIS,
    "network_dim": 2,
    "network_args": {"algo": "lokr", "dora_wd": True, "use_scalar": True, "train_norm": True, "factor": 2,
                     "rank_dropout": 0.2, "module_dropout": 0.2},
    "max_train_steps": 4,
    "gradient_checkpointing": True,
}  # fmt: skip


def tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {f"{name}.{end}": tensor for name, one in adapter.modules.items() for end, tensor in one.tensors().items()}


def test_resuming_gives_the_same_bits(basics, tmp_path) -> None:
    asked = {**basics, **MIXED, "save_every_n_steps": 1, "save_state": True, "output_name": "x"}
    whole = train(settings(**asked))
    state = tmp_path / "out" / "x-step00000003-state"
    resumed = train(settings(**{**asked, "output_dir": str(tmp_path / "again"), "resume": str(state)}))
    assert resumed.losses == whole.losses[3:]
    ours, theirs = tensors(resumed.adapter), tensors(whole.adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert resumed.adapter.kinds.keys() == {"DoRA", "norm"}


@pytest.mark.parametrize("save", ["safetensors", "pt"])
def test_metadata_and_keys_are_those_of_other_trainers(basics, tmp_path, save) -> None:
    args = {"factor": "2", "conv_dim": "2"}
    asked = {**basics, "network_module": "networks.lokr", "network_args": args, "save_model_as": save,
             "save_precision": "fp16", "output_name": "x", "max_train_steps": 1}  # fmt: skip
    train(settings(**asked))
    adapter = Adapter.load(tmp_path / "out" / f"x.{save}")
    assert adapter.kinds == {"LoKr": len(adapter.modules)}
    keys = {key.rpartition(".")[2] for key in tensors(adapter)}
    assert keys <= {"alpha", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
    if save == "safetensors":
        assert adapter.metadata["ss_network_module"] == "networks.lokr"
        assert json.loads(adapter.metadata["ss_network_args"]) == args
        assert (adapter.metadata["ss_network_dim"], adapter.metadata["ss_network_alpha"]) == ("2", "1")


def test_base_weights_are_part_of_the_base(basics, tmp_path) -> None:
    """Of any kind, biases too, at their multiplier."""
    asked = {**basics, **LYCORIS, "output_name": "x", "learning_rate": 0.05, "network_train_unet_only": True,
             "network_args": {"algo": "lokr", "dora_wd": True, "train_norm": True}}  # fmt: skip
    trained = train(settings(**asked))
    file = str(tmp_path / "out" / "x.safetensors")
    for multiplier in (1.0, 0.5):
        trained.models.denoiser.set_adapters(adapters.ADAPTER, multiplier)
        expected = outputs(trained.models.denoiser.eval())
        run = prepare(settings(**basics, base_weights=[file], base_weights_multiplier=[multiplier]))
        before = outputs(load_base_models(run.settings).denoiser.eval())
        assert difference(outputs(run.models.denoiser.eval()), expected, before) < 1e-3


def test_training_starts_from_a_file(basics, tmp_path) -> None:
    """Of the same kind with --network_weights, and whatever it holds with --dim_from_weights."""
    asked = {**basics, "network_module": "networks.loha", "output_name": "x", "learning_rate": 0.1}
    first = train(settings(**asked)).adapter
    file = str(tmp_path / "out" / "x.safetensors")
    for more in ({}, {"dim_from_weights": True, "network_module": "lycoris.kohya"}):
        again = {**asked, "network_weights": file, **more}
        run = prepare(settings(**again))
        live = tensors(Adapter.from_models(run.trained, adapter_name=adapters.ADAPTER))
        assert live.keys() == tensors(first).keys()
        assert all(torch.equal(live[key], tensor) for key, tensor in tensors(first).items())
    with pytest.raises(TrainingError, match="has a LoHa of another kind or shape; give the same network options"):
        prepare(settings(**{**asked, "network_weights": file, "network_dim": 3}))
    with pytest.raises(TrainingError, match="has a LoHa, not a LoRA; give the same network options"):
        prepare(settings(**{**asked, "network_weights": file, "network_module": "networks.lora"}))


@pytest.mark.parametrize("algo", ["loha", "full", "ia3"])
def test_dry_run_and_norms(basics, algo) -> None:
    from lora_adapters.train.training.dry_run import report
    from lora_adapters.train.training.regularization import limit_norms, norms

    args = {"algo": algo, "train_norm": True, "verbose": True}
    run = prepare(settings(**{**basics, **LYCORIS, "network_args": args}))
    shown = report(run)
    assert f"adapter: lycoris.kohya, rank {2 if algo == 'loha' else 0}, {len(run.layers)} modules" in shown
    assert f"{sum(parameter.numel() for parameter in run.parameters):,} parameters" in shown
    assert "chosen by preset" in shown
    for parameter in run.parameters:
        torch.nn.init.normal_(parameter)
    before = norms(run.layers, adapters.ADAPTER)
    largest = float(before.median())
    assert limit_norms(run.layers, adapters.ADAPTER, largest) == (before > largest).sum()
    torch.testing.assert_close(norms(run.layers, adapters.ADAPTER), before.clamp(max=largest), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_dropout": 0.1}, "network_dropout: a LoHa has no activations between its factors"),
        ({"scale_weight_norms": 1.0, "network_args": {"algo": "boft"}, "network_dim": 8},
         "--scale_weight_norms: a BOFT has no factor to scale"),
        ({"scale_weight_norms": 1.0, "network_args": {"algo": "loha", "dora_wd": True}},
         "--scale_weight_norms: a DoRA has no factor to scale"),
    ],
)  # fmt: skip
def test_what_a_kind_has_not(basics, changes, message) -> None:
    with pytest.raises(TrainingError, match=message):
        prepare(settings(**{**basics, **LYCORIS, "network_args": {"algo": "loha"}, **changes}))
