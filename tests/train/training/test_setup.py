import os
import shutil

import pytest

from lora_adapters.convert import portable
from lora_adapters.train.data_error import DataError
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.memory import attention, check_machine
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training import setup
from lora_adapters.train.training.checkpoints import Position, save_state
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.setup import decide_seed, length, prepare, workers


@pytest.mark.parametrize(
    ("options", "batches", "expected"),
    [
        ({"max_train_steps": 10}, 4, (10, 3)),
        ({"max_train_steps": 10, "gradient_accumulation_steps": 3}, 4, (10, 5)),  # two steps an epoch
        ({"max_train_steps": 10, "max_train_epochs": 3}, 4, (12, 3)),
        ({"max_train_epochs": 3, "gradient_accumulation_steps": 3}, 4, (6, 3)),
    ],
)
def test_steps_and_epochs(options, batches, expected) -> None:
    assert length(settings(**options), batches) == expected


def test_an_option_that_is_given_at_its_default_counts(basics) -> None:
    """The smallest bucket is half the resolution unless the option says 256."""
    setup.open_data(settings(**basics, enable_bucket=True), seed=1)
    with pytest.raises(DataError, match="min_bucket_reso 256 is larger than the resolution"):
        setup.open_data(settings(**basics, enable_bucket=True, min_bucket_reso=256), seed=1)


def test_seed_is_the_given_one_or_drawn() -> None:
    assert decide_seed(settings(seed=5)) == 5
    assert decide_seed(settings()) != decide_seed(settings())


def test_a_resumed_run_keeps_its_seed(tmp_path) -> None:
    save_state(tmp_path / "x-state", {}, Position(step=1, seed=11))
    assert decide_seed(settings(resume=str(tmp_path / "x-state"))) == 11
    assert decide_seed(settings(resume=str(tmp_path / "x-state"), seed=5)) == 5


def test_clip_skip_has_as_many_layers_to_skip_as_the_text_encoder(basics, tmp_path) -> None:
    prepare(settings(**basics, clip_skip=2))
    with pytest.raises(TrainingError, match="--clip_skip 3: the text encoder has 2 layers"):
        prepare(settings(**basics, clip_skip=3))


def test_the_output_folder_can_be_used_before_anything_is_loaded(basics, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(setup, "load_base_models", lambda *_: pytest.fail("loaded"))
    for place in ("file", "file/out"):
        with pytest.raises(TrainingError, match=r"--output_dir .*file.* cannot be created \("):
            prepare(settings(**{**basics, "output_dir": str(tmp_path / place)}))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(TrainingError, match="out is not writable"):
        prepare(settings(**basics))


def test_no_more_workers_than_cores() -> None:
    assert workers(settings(max_data_loader_n_workers=10_000)) == os.cpu_count()
    assert workers(settings(max_data_loader_n_workers=0)) == 0


def test_of_several_attention_options_one_is_taken_and_said(caplog) -> None:
    asked = settings(sdpa=True, mem_eff_attn=True, xformers=True)
    check_machine(asked)
    assert attention(asked) == "mem_eff_attn"
    assert "--sdpa has no effect together with --mem_eff_attn" in caplog.text
    assert attention(settings()) is None


def test_text_encoder_is_trained_unless_its_outputs_are_cached(basics) -> None:
    with pytest.raises(TrainingError, match="needs --network_train_unet_only"):
        prepare(settings(**basics, cache_text_encoder_outputs=True))


def test_cached_parts_leave_the_trained_module(basics) -> None:
    prepared = prepare(settings(**basics, network_train_unet_only=True, cache_text_encoder_outputs=True))
    assert not list(prepared.plain.text_encoders.parameters())
    batch = next(prepared.data.batches(0))
    assert batch.text["hidden_state"].shape == (2, 77, 32)


def test_text_outputs_on_disk_are_made_anew_under_other_base_weights(basics, tmp_path) -> None:
    train(settings(**basics))
    options = {**basics, "network_train_unet_only": True, "cache_text_encoder_outputs_to_disk": True}
    options["train_data_dir"] = str(shutil.copytree(basics["train_data_dir"], tmp_path / "images"))
    prepare(settings(**options))
    file = tmp_path / "images" / "1_shape" / "00_te_outputs.npz"
    before = file.stat().st_mtime_ns
    prepare(settings(**options))
    assert file.stat().st_mtime_ns == before
    prepare(settings(**options, base_weights=[str(tmp_path / "out" / "last.safetensors")]))
    assert file.stat().st_mtime_ns != before


def test_block_rates_become_groups(basics) -> None:
    args = {"down_lr_weight": "zeros+0.5", "mid_lr_weight": "0", "loraplus_unet_lr_ratio": "4"}
    prepared = prepare(settings(**basics, network_args=args, unet_lr=1e-3, text_encoder_lr=[0.0]))
    rates = {group["name"]: group["lr"] for group in prepared.optimizer.param_groups}
    assert rates["unet_block1"] == pytest.approx(5e-4)
    assert rates["unet_block1 plus"] == pytest.approx(2e-3)
    assert rates["unet_block16"] == pytest.approx(1e-3)
    assert "unet_block12" not in rates
    assert not any(name.startswith("text_encoder") for name in rates)
    assert not any(p.requires_grad for p in prepared.models.text_encoders[0].parameters())
    assert {id(p) for p in prepared.parameters} == {
        id(p) for group in prepared.optimizer.param_groups for p in group["params"]
    }


def test_without_any_block_of_the_unet_the_text_encoder_is_trained_alone(basics) -> None:
    args = {"down_lr_weight": "zeros", "mid_lr_weight": "0", "up_lr_weight": "zeros"}
    assert list(prepare(settings(**basics, network_args=args)).trained) == ["text_encoder"]
    with pytest.raises(TrainingError, match="nothing is left to train in unet: every block has rank or weight 0"):
        prepare(settings(**basics, network_args=args, network_train_unet_only=True))


def test_names_that_windows_does_not_take_are_refused_before_anything_is_loaded(basics, monkeypatch) -> None:
    monkeypatch.setattr(setup, "load_base_models", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(portable, "WINDOWS", True)
    with pytest.raises(TrainingError, match=r"--output_name my: lora: Windows does not allow ':' in names"):
        prepare(settings(**{**basics, "output_name": "my: lora"}))
