"""Options whose effect is seen only in a run that is set up, or in what it leaves behind."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lora_adapters.convert import Adapter
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.memory import apply_memory_options
from lora_adapters.train.models.text_encoding import Encoded
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train, train_prepared
from lora_adapters.train.training.regularization import norms
from lora_adapters.train.training.setup import prepare
from lora_adapters.types.dylora.rank_sampling import ranks_of_step


def test_no_half_vae_keeps_the_vae_alone_in_fp32(basics) -> None:
    half = prepare(settings(**basics, mixed_precision="bf16"))
    assert half.models.vae.dtype == half.models.denoiser.conv_in.weight.dtype == torch.bfloat16
    whole = prepare(settings(**basics, mixed_precision="bf16", no_half_vae=True))
    assert (whole.models.vae.dtype, whole.models.denoiser.conv_in.weight.dtype) == (torch.float32, torch.bfloat16)


def test_the_seed_decides_start_order_and_noise(basics) -> None:
    def drawn(seed: int) -> tuple[torch.Tensor, list[str], list[int]]:
        run = prepare(settings(**{**basics, "seed": seed}))
        batch = next(run.data.batches(0))
        return run.layers[0].lora_A["default"].weight.detach(), batch.captions, batch.sample_seeds.tolist()

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one[0], again[0])
    assert one[1:] == again[1:]
    assert not torch.equal(one[0], other[0])
    assert one[2] != other[2]


@pytest.mark.parametrize("length", [75, 150, 225])
def test_max_token_length_is_what_the_unet_reads(basics, length) -> None:
    run = prepare(settings(**basics, max_token_length=length))
    tokens = run.loss.text(next(run.data.batches(0)))
    assert not isinstance(tokens, Encoded)
    assert run.plain.encode(tokens).hidden.shape == (2, length + 2, 32)


def test_dim_from_weights_takes_ranks_and_alphas_of_the_file(basics, tmp_path) -> None:
    train(settings(**basics, network_alpha=3, network_args={"conv_dim": 1}, output_name="a"))
    file = tmp_path / "out" / "a.safetensors"
    options = {**basics, "network_dim": 7, "max_train_steps": 1, "learning_rate": 1e-12}
    again = train(settings(**options, network_weights=file, dim_from_weights=True)).adapter
    before = Adapter.load(file)
    assert again.modules.keys() == before.modules.keys()
    for name, one in before.modules.items():
        assert (one.rank, one.alpha) == (again.modules[name].rank, again.modules[name].alpha)
        torch.testing.assert_close(again.modules[name].delta(), one.delta(), rtol=1e-4, atol=1e-6)


def test_dim_from_weights_keeps_a_dylora_s_facts_but_for_those_given(basics, tmp_path) -> None:
    options = {**basics, "network_module": "networks.dylora", "network_dim": 4, "max_train_steps": 1}
    train(settings(**options, network_args={"unit": 2, "rank_scaling": "constant"}, output_name="a"))
    file = tmp_path / "out" / "a.safetensors"
    given = {"network_args": {"rank_sampling": "uniform"}, "network_weights": file, "dim_from_weights": True}
    assert Adapter.load(file).dylora == DyLora(2, "constant", False, "spread")
    again = train(settings(**{**options, "network_dim": 8}, **given)).adapter
    assert again.dylora == DyLora(2, "constant", False, "uniform")


def test_each_batch_of_a_step_has_ranks_of_its_own_that_its_parts_share(basics) -> None:
    options = {**basics, "network_module": "networks.dylora", "network_dim": 8, "gradient_accumulation_steps": 2}
    run = prepare(settings(**options))
    whole = next(run.data.batches(0))
    parts = [next(run.data.batches(0, rank=rank, world_size=2)) for rank in (0, 1)]

    def ranks(step, number, batch):
        run.tell_step(step, number, batch)
        return run.dials[0].ranks_of_step(len(batch.captions))

    steps = [ranks(step, number, whole) for step in range(4) for number in (0, 1)]
    assert len({tuple(step) for step in steps}) > 3
    assert steps[2:4] != steps[:2]
    together = [rank for part in parts for rank in ranks(1, 0, part)]
    assert len(together) == sum(len(part.captions) for part in parts) == parts[0].total
    whole_batch = range(len(together))
    drawn = ranks_of_step(tuple(range(1, 9)), "spread", 7, 2, whole_batch, len(together), sorted_components=True)
    assert together == drawn


def test_max_grad_norm_and_rate_bound_a_step_of_sgd(basics) -> None:
    options = {**basics, "optimizer_type": "SGD", "learning_rate": 0.5, "max_train_steps": 1}

    def moved(limit: float) -> float:
        run = prepare(settings(**options, max_grad_norm=limit))
        before = [p.detach().clone() for p in run.parameters]
        train_prepared(run)
        return sum((p - b).square().sum() for p, b in zip(run.parameters, before, strict=True)).sqrt().item()

    assert moved(1e-3) == pytest.approx(0.5e-3, rel=1e-3)
    assert moved(0) > 2e-3  # 0 turns it off


def test_scale_weight_norms_holds_every_change_down(basics) -> None:
    free = prepare(settings(**basics))
    train_prepared(free)
    limit = norms(free.layers, "default").median().item()
    run = prepare(settings(**basics, scale_weight_norms=limit))
    train_prepared(run)
    assert norms(run.layers, "default").max().item() <= limit * (1 + 1e-5)


def test_xformers_is_put_on_unet_and_vae(basics) -> None:
    """Its kernels need a GPU; that they are asked for is seen on any machine."""
    asked: list[str] = []
    parts = {
        name: SimpleNamespace(enable_xformers_memory_efficient_attention=lambda n=name: asked.append(n))
        for name in ("denoiser", "vae")
    }
    apply_memory_options(SimpleNamespace(**parts, text_encoders=[]), settings(xformers=True), trained_text=False)
    assert asked == ["denoiser", "vae"]


def test_two_equal_text_encoder_rates_are_one(basics) -> None:
    """kohya's GUI writes the rate twice for SD1.x too."""
    run = prepare(settings(**basics, text_encoder_lr=[2e-4, 2e-4]))
    assert {group["lr"] for group in run.optimizer.param_groups if group["name"] == "text_encoder"} == {2e-4}
    with pytest.raises(TrainingError, match="--text_encoder_lr has 2 values for 1"):
        prepare(settings(**basics, text_encoder_lr=[2e-4, 1e-4]))


def test_saves_and_measurements_come_when_they_were_asked_for(basics, tmp_path) -> None:
    """8 images, 2 held out: 3 batches an epoch, 4 epochs."""
    pytest.importorskip("tensorboard")
    options = {
        **basics,
        "max_train_epochs": 4,
        "validation_split": 0.25,
        "validate_every_n_steps": 5,
        "save_n_epoch_ratio": 2,
        "save_model_as": "pt",
        "save_precision": "fp16",
        "output_name": "x",
        "logging_dir": str(tmp_path / "log"),
        "log_prefix": "mine-",
    }
    result = train(settings(**options))
    assert [one.step for one in result.held_out] == [0, 5, 10, 12]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x-000002.pt", "x-report.html", "x.pt"]
    assert {value.dtype for value in torch.load(tmp_path / "out" / "x.pt", weights_only=True).values()} == {
        torch.float16
    }
    assert [path.name[:5] for path in (tmp_path / "log").iterdir()] == ["mine-"]


def test_held_out_loss_every_n_epochs_over_some_batches(basics, monkeypatch) -> None:
    from lora_adapters.train.objective.step_loss import StepLoss

    measured: list[int] = []
    plain = StepLoss.held_out

    def counted(self, batch, timesteps):
        measured.append(len(batch.captions))
        return plain(self, batch, timesteps)

    monkeypatch.setattr(StepLoss, "held_out", counted)
    options = {**basics, "train_batch_size": 1, "max_train_epochs": 4, "validation_split": 0.5}
    result = train(settings(**options, validate_every_n_epochs=3, max_validation_steps=2))
    assert [one.step for one in result.held_out] == [0, 12, 16]  # 4 batches an epoch; before, every third, at the end
    assert measured == [1] * 6


def test_samples_every_n_steps(basics, tmp_path, monkeypatch) -> None:
    (tmp_path / "p.txt").write_text("a red disc --w 64 --h 64 --s 1")
    options = {**basics, "sample_every_n_steps": 2, "sample_prompts": str(tmp_path / "p.txt"), "output_name": "x"}
    train(settings(**options))
    assert [path.name for path in (tmp_path / "out" / "sample").iterdir()] == ["x-step00000002.png"]


def test_the_last_seed_has_samples_too(basics, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a red disc --w 64 --h 64 --s 1\na blue square --w 64 --h 64 --s 1")
    samples = {"sample_every_n_steps": 2, "sample_prompts": str(tmp_path / "p.txt"), "output_name": "x"}
    train(settings(**{**basics, **samples, "seed": 2**64 - 1}))  # the second prompt's own seed is one more
    assert (tmp_path / "out" / "sample" / "x-step00000002.png").exists()


def test_samples_of_a_dylora_have_a_labelled_row_for_each_rank(basics, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a red disc --w 64 --h 64 --s 1")
    options = {**basics, "network_module": "networks.dylora", "network_args": {"unit": 1}, "network_dim": 2}
    samples = {"sample_every_n_steps": 2, "sample_prompts": str(tmp_path / "p.txt"), "output_name": "x"}
    train(settings(**{**options, **samples}))
    sheet = Image.open(tmp_path / "out" / "sample" / "x-step00000002.png")
    labels = np.asarray(sheet.convert("L"))[:, :120]  # the margin, white but for the labels
    inked = np.flatnonzero((labels < 128).any(axis=1))
    assert 1 + (np.diff(inked) > 20).sum() == 2
