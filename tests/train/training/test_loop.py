"""Real training on tiny models: what must be equal, and that the loss falls."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import lora_adapters  # noqa: F401  (plugs into load_lora_weights)
from lora_adapters.convert import Adapter
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.loop import train
from tests.train.training.test_resume import same


def close(first: Adapter, second: Adapter, tolerance: float = 1e-5) -> bool:
    return all(
        torch.allclose(one.up, second.modules[name].up, atol=tolerance)
        and torch.allclose(one.down, second.modules[name].down, atol=tolerance)
        for name, one in first.modules.items()
    )


def test_training_learns_and_its_file_is_what_was_trained(basics, sd1, tmp_path) -> None:
    options = {**basics, "max_train_steps": 8, "validation_split": 0.25, "network_args": {"conv_dim": "2"}}
    trained = train(settings(**options, output_name="x", cache_latents=True))
    assert trained.held_out[-1].loss < trained.held_out[0].loss
    assert len(trained.losses) == trained.steps == 8
    loaded = Adapter.load(tmp_path / "out" / "x.safetensors")
    assert same(loaded, trained.adapter)
    assert loaded.metadata["ss_steps"] == "8"
    pipe = StableDiffusionPipeline.from_pretrained(sd1)
    pipe.load_lora_weights(tmp_path / "out" / "x.safetensors")
    inputs = torch.ones(1, 4, 8, 8), 7, torch.ones(1, 77, 32)
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(*inputs).sample, trained.models.denoiser(*inputs).sample)


def test_gradient_checkpointing_changes_nothing(basics) -> None:
    options = {**basics, "network_module": "networks.dylora", "network_args": {"unit": "1"}}
    plain = train(settings(**options))
    again = train(settings(**options, gradient_checkpointing=True))
    assert close(plain.adapter, again.adapter)
    assert plain.losses == pytest.approx(again.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["mem_eff_attn", "sdpa", "cpu_offload_checkpointing"])
def test_memory_options_change_nothing(basics, option) -> None:
    plain = train(settings(**basics))
    assert close(plain.adapter, train(settings(**basics, **{option: True})).adapter, 2e-4)


def test_accumulated_batches_are_one_batch(basics) -> None:
    """Two batches of 2 in one step are one batch of 4: the images of an epoch are the same ones."""
    options = {**basics, "max_train_epochs": 1}
    one = train(settings(**{**options, "train_batch_size": 8}))
    four = train(settings(**{**options, "train_batch_size": 2, "gradient_accumulation_steps": 4}))
    assert len(one.losses) == len(four.losses) == 1
    assert one.losses == pytest.approx(four.losses, rel=1e-5)
    assert close(one.adapter, four.adapter, 1e-4)


def test_the_last_batches_of_an_epoch_are_a_step(basics) -> None:
    trained = train(settings(**{**basics, "gradient_accumulation_steps": 3, "max_train_epochs": 2}))
    assert trained.steps == 4  # 4 batches an epoch, in groups of 3 and 1


def test_cached_text_is_the_text(basics) -> None:
    options = {**basics, "network_train_unet_only": True}
    plain, cached = train(settings(**options)), train(settings(**options, cache_text_encoder_outputs=True))
    assert plain.losses == pytest.approx(cached.losses, rel=1e-5)
    assert close(plain.adapter, cached.adapter, 3e-4)  # Adam's first steps make the most of rounding


@pytest.mark.slow
def test_cached_latents_are_those_of_the_vae(basics) -> None:
    """With a VAE whose posterior has no width, a cached sample is every sample."""
    from lora_adapters.train.models.base import load_base_models

    adapters = []
    for cached in (False, True):
        options = settings(**basics, cache_latents=cached)
        models = load_base_models(options)
        with torch.no_grad():
            models.vae.quant_conv.weight[4:] = 0
            models.vae.quant_conv.bias[4:] = -30
        adapters.append(train(options, models=models).adapter)
    assert close(*adapters, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("only", ["unet", "text_encoder"])
def test_only_one_part_is_trained(basics, only) -> None:
    trained = train(settings(**basics, **{f"network_train_{only}_only": True}))
    assert trained.adapter.components == (only,)
    assert max(one.up.abs().max() for one in trained.adapter.modules.values()) > 0


@pytest.mark.slow
def test_sdxl_trains_both_text_encoders(basics, sdxl, tmp_path) -> None:
    options = {**basics, "pretrained_model_name_or_path": str(sdxl), "max_train_steps": 2}
    trained = train(settings(**options, save_precision="fp16"))
    assert set(trained.adapter.components) == {"unet", "text_encoder", "text_encoder_2"}
    loaded = Adapter.load(tmp_path / "out" / "last.safetensors")
    assert loaded.metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert {one.up.dtype for one in loaded.modules.values()} == {torch.float16}


@pytest.mark.slow
def test_sdxl_with_cached_text(basics, sdxl) -> None:
    options = {**basics, "pretrained_model_name_or_path": str(sdxl), "max_train_steps": 2}
    options["network_train_unet_only"] = True
    plain, cached = train(settings(**options)), train(settings(**options, cache_text_encoder_outputs=True))
    assert plain.losses == pytest.approx(cached.losses, rel=1e-5)
    assert close(plain.adapter, cached.adapter, 3e-4)  # Adam's first steps make the most of rounding


@pytest.mark.slow
def test_mixed_precision_trains_weights_in_fp32(basics) -> None:
    trained = train(settings(**basics, mixed_precision="bf16"))
    assert {one.up.dtype for one in trained.adapter.modules.values()} == {torch.float32}
    assert trained.models.denoiser.conv_in.weight.dtype == torch.bfloat16
    full = train(settings(**basics, mixed_precision="bf16", full_bf16=True))
    assert {one.up.dtype for one in full.adapter.modules.values()} == {torch.bfloat16}
    assert trained.losses == pytest.approx(full.losses, rel=0.05)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_save(basics, tmp_path, monkeypatch) -> None:
    from lora_adapters.train.objective.step_loss import StepLoss

    plain, calls = StepLoss.training, []

    def broken(self, batch):
        calls.append(1)
        return plain(self, batch) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(StepLoss, "training", broken)
    with pytest.raises(TrainingError, match="the loss is nan at step 3"):
        train(settings(**basics, save_every_n_steps=1, output_name="x"))
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert saved == ["x-report.html", "x-step00000001.safetensors", "x-step00000002.safetensors"]
    assert all(one.up.isfinite().all() for one in Adapter.load(tmp_path / "out" / saved[-1]).modules.values())


def test_saves_samples_and_logs(basics, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "prompts.txt").write_text("a red disc --w 64 --h 64 --s 2\na blue square --w 64 --h 64 --s 2\n")
    options = {**basics, "network_module": "networks.dylora", "max_train_steps": 5, "validation_split": 0.25}
    train(
        settings(
            **options,
            save_every_n_epochs=1,
            save_state=True,
            sample_at_first=True,
            sample_every_n_epochs=1,
            sample_prompts=tmp_path / "prompts.txt",
            logging_dir=tmp_path / "log",
            log_tracker_name="run",
            output_name="x",
        )
    )
    out = tmp_path / "out"
    names = ["sample", "x-000001-state", "x-000001.safetensors", "x-report.html", "x-state", "x.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names  # an epoch is 3 steps: one ends within the run
    assert [path.name for path in sorted((out / "sample").iterdir())] == ["x-step00000000.png", "x-step00000003.png"]
    events = EventAccumulator(str(next((tmp_path / "log").glob("*/run"))))
    events.Reload()
    wanted = {"loss/current", "loss/average", "lr/unet", "lr/text_encoder", "norm/gradient", "loss/validation_rank2"}
    assert wanted <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/current")] == [1, 2, 3, 4, 5]
    assert events.Tags()["images"] == ["samples"]


def test_block_rates_and_start_weights(basics, tmp_path) -> None:
    first = train(settings(**basics, output_name="a"))
    options = {**basics, "learning_rate": 0.0, "unet_lr": 1e-3, "network_alpha": 2, "max_train_steps": 1}
    options |= {"network_args": {"mid_lr_weight": "0.5", "down_lr_weight": "0"}, "output_dir": str(tmp_path / "b")}
    second = train(settings(**options, network_weights=tmp_path / "out" / "a.safetensors"))
    paths = {name.path for name in second.adapter.modules if name.component == "unet"}
    assert not any(path.startswith("down_blocks") for path in paths)
    for name, one in second.adapter.modules.items():
        if name.component == "text_encoder":  # a rate of 0: saved as it was, alpha made up for
            torch.testing.assert_close(one.delta(), first.adapter.modules[name].delta())


def test_base_weights_are_part_of_the_base(basics, tmp_path) -> None:
    train(settings(**basics, output_name="a"))
    file = tmp_path / "out" / "a.safetensors"
    zero = {**basics, "learning_rate": 1e-12, "max_train_steps": 1}
    plain = train(settings(**zero))
    merged = train(settings(**zero, base_weights=[str(file)], base_weights_multiplier=[0.5]))
    name, one = next(item for item in Adapter.load(file).modules.items() if item[0].component == "unet")
    weights = [trained.models.denoiser.get_submodule(name.path).base_layer.weight for trained in (plain, merged)]
    torch.testing.assert_close(weights[1] - weights[0], 0.5 * one.delta().view_as(weights[0]), atol=1e-6, rtol=1e-4)
