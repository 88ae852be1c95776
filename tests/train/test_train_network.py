"""The program: its mistakes are one line on stderr and exit status 1 or 2, and nothing is left behind."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_adapters.convert import Adapter
from lora_adapters.train.train_network import main
from lora_adapters.train.training import saving
from tests.train.training.test_resume import PROGRAM, command_line


def fails(options: dict, capsys, monkeypatch, status: int = 1) -> str:
    """The error of a run that must end before the base model is loaded."""

    def loaded(*_, **__):
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr("lora_adapters.train.training.setup.load_base_models", loaded)
    assert main(command_line(options)) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


WRONG_USAGE = [
    ({"full_bf16": True}, "needs --mixed_precision bf16"),
    ({"full_fp16": True}, "needs --mixed_precision fp16"),
    ({"deepspeed": True}, "DeepSpeed is not supported"),
    ({"max_train_steps": 0}, "--max_train_steps must be at least 1"),
    ({"vae_batch_size": -1}, "--vae_batch_size must be at least 1, not -1"),
    ({"max_validation_steps": -1}, "--max_validation_steps must be at least 1, not -1"),
    ({"lr_scheduler_timescale": -1}, "--lr_scheduler_timescale must be at least 1, not -1"),
    ({"max_data_loader_n_workers": -1}, "--max_data_loader_n_workers must be at least 0, not -1"),
    ({"huber_c": 0, "loss_type": "huber"}, "--huber_c must be above 0, not 0"),
    ({"seed": 2**64}, "--seed 18446744073709551616: seeds are 0 to 18446744073709551615"),
    ({"seed": -1}, "--seed -1: seeds are 0 to 18446744073709551615; one is drawn without --seed"),
    ({"min_timestep": 900, "max_timestep": 100}, "--min_timestep 900 and --max_timestep 100"),
    ({"lr_scheduler": "cosin"}, "not one of linear"),
    ({"log_with": "tensorboard"}, "needs --logging_dir"),
    ({"masked_loss": True}, "--masked_loss needs masks"),
    ({"async_upload": True}, "needs --huggingface_repo_id"),
    ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "leave nothing to train"),
    ({"no_such_option": 1}, "unrecognized arguments: --no_such_option=1"),
    ({"learning_rat": 1}, "unrecognized arguments: --learning_rat=1; did you mean --learning_rate?"),
]
BEFORE_THE_MODEL = [
    ({"pretrained_model_name_or_path": "/nowhere/model"}, "/nowhere/model does not exist"),
    ({"pretrained_model_name_or_path": "model.safetensors"}, "model.safetensors does not exist"),
    ({"network_args": {"block_dims": "1,2"}}, "block_dims has 2 values"),
    ({"network_module": "networks.dylora", "network_args": {"unit": "3"}}, "unit 3 does not divide"),
    ({"mixed_precision": "fp16"}, "use --mixed_precision bf16"),
    ({"xformers": True}, "use --sdpa"),
    (
        {"mixed_precision": "fp16", "xformers": True},
        "fp16 and --xformers need a CUDA device; use --mixed_precision bf16 or no and --sdpa",
    ),
    ({"network_module": "networks.lora_fa"}, "LoRA-FA, which trains only `up`, is not supported; give networks"),
    ({"network_module": "networks.lroa"}, "networks.lroa; the nearest known name is networks.lora"),
    ({"train_data_dir": "/nowhere/data"}, "/nowhere/data"),
    ({"base_weights": "nowhere.safetensors"}, "--base_weights nowhere.safetensors does not exist"),
    ({"network_weights": "owner/name"}, "--network_weights owner/name"),
    ({"network_weights": __file__}, f"--network_weights {__file__}"),
    ({"resume": str(Path(__file__).parent)}, "not a saved state"),
    ({"network_dim": 0}, "network_dim is 0: a rank is at least 1"),
    ({"resume": "/nowhere/state"}, "--resume /nowhere/state does not exist"),
    ({"network_weights": "nowhere.safetensors"}, "--network_weights nowhere.safetensors does not exist"),
    ({"optimizer_type": "Nadda"}, "there is no Nadda"),
]


@pytest.mark.parametrize(
    ("changes", "message", "status"),
    [*((*row, 2) for row in WRONG_USAGE), *((*row, 1) for row in BEFORE_THE_MODEL)],
)
def test_one_line_before_the_model_is_loaded(basics, tmp_path, capsys, monkeypatch, changes, message, status) -> None:
    if "log_with" in changes:
        pytest.importorskip("tensorboard")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in fails({**basics, **changes}, capsys, monkeypatch, status)
    assert not (tmp_path / "out").exists()


def test_missing_options(basics, capsys, monkeypatch) -> None:
    for name in ("pretrained_model_name_or_path", "network_module", "output_dir", "train_data_dir"):
        rest = {key: value for key, value in basics.items() if key != name}
        assert f"--{name}" in fails(rest, capsys, monkeypatch, status=2)


def test_empty_folder_and_broken_images(basics, images, tmp_path, capsys, monkeypatch) -> None:
    data = tmp_path / "data"
    (data / "1_x").mkdir(parents=True)
    assert "1_x" in fails({**basics, "train_data_dir": str(data)}, capsys, monkeypatch)
    (data / "1_x" / "a.png").touch()
    assert main(command_line({**basics, "train_data_dir": str(data)})) == 1
    monkeypatch.undo()
    shutil.copy(next((images / "1_shape").glob("*.png")), data / "1_x" / "b.png")
    assert main(command_line({**basics, "train_data_dir": str(data), "max_train_steps": 1})) == 0


def test_model_folder_without_an_index(basics, tmp_path, capsys, monkeypatch) -> None:
    basics["pretrained_model_name_or_path"] = str(tmp_path)
    assert "has no model_index.json" in fails(basics, capsys, monkeypatch)


def test_dry_run_trains_nothing(basics, tmp_path, capsys) -> None:
    options = {**basics, "dry_run": True, "network_module": "networks.dylora", "network_args": {"conv_dim": "4"}}
    assert main(command_line(options)) == 0
    shown = capsys.readouterr().out
    assert "steps: 3 in 1 epochs of 4" in shown
    assert "  MID " in shown
    assert re.search(r"text_encoder +12 ", shown)
    assert "adapter: networks.dylora, rank 2 to 4, " in shown
    assert "00.png: a " in shown
    assert shown.count(".png: ") == 3
    assert not (tmp_path / "out").exists()


def test_full_disk_while_saving(basics, tmp_path, capsys, monkeypatch) -> None:
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr(saving, "PATIENCE", (0, 0))
    assert main(command_line({**basics, "save_every_n_steps": 1})) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said.splitlines()[-1]
    assert [f"step {step} is not saved" in said for step in (1, 2, 3)] == [True] * 3
    assert said.count("trying again in 0 s: free some disk space") == 2
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_disk_that_has_room_again(basics, tmp_path, monkeypatch) -> None:
    """A save that fails in the middle of training stops nothing, and the last one is tried again."""
    import safetensors.torch

    plain, calls = safetensors.torch.save_file, []

    def full_for_a_while(*args, **options):
        calls.append(1)
        if len(calls) in (1, 4):
            raise OSError(28, "No space left on device")
        return plain(*args, **options)

    monkeypatch.setattr("safetensors.torch.save_file", full_for_a_while)
    monkeypatch.setattr(saving, "PATIENCE", (0,))
    assert main(command_line({**basics, "save_every_n_steps": 1, "output_name": "x"})) == 0
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["x-report.html", "x-step00000002.safetensors", "x-step00000003.safetensors", "x.safetensors"]


def test_samples_and_logs_that_fail_stop_nothing(basics, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "prompts.txt").write_text("a red disc --w 64 --h 64 --s 2")
    logged = []

    def broken_log(self, values, step, **_):
        logged.append(step)
        raise ConnectionError("the tracker is away")

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("accelerate.Accelerator.log", broken_log)
    monkeypatch.setattr("lora_adapters.train.training.evaluation.sample", too_large)
    samples = {"sample_every_n_steps": 2, "sample_prompts": tmp_path / "prompts.txt"}
    monkeypatch.setattr("accelerate.Accelerator.end_training", lambda self: broken_log(self, {}, 0))
    assert main(command_line({**basics, **samples, "logging_dir": tmp_path / "log"})) == 0
    said = capsys.readouterr().err
    assert "no sample images at step 2 (CUDA out of memory)" in said
    assert "nothing is logged from step 1 on (the tracker is away)" in said
    assert "the logs were not closed (the tracker is away)" in said
    assert logged == [1, 0]
    assert (tmp_path / "out" / "last.safetensors").exists()


def test_a_tracker_that_cannot_start(basics, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("tensorboard")

    def away(*_, **__):
        raise ConnectionError("no route to the tracker")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", away)
    assert main(command_line({**basics, "logging_dir": tmp_path / "log"})) == 1
    assert "error: --log_with tensorboard cannot start (no route to the tracker)" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_as_a_file_from_anywhere(basics, tmp_path) -> None:
    command = [sys.executable, str(PROGRAM), *command_line({**basics, "max_train_steps": 1})]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out" / "last.safetensors").exists()


def test_a_file_of_kohyas_gui_trains_and_what_has_no_effect_is_said(sd1, images, tmp_path, capsys, caplog) -> None:
    gui = Path(__file__).with_name("gui.toml")
    places = {"pretrained_model_name_or_path": sd1, "train_data_dir": images, "output_dir": tmp_path / "out"}
    assert main(command_line({"config_file": gui, **places})) == 0
    said = caplog.text + capsys.readouterr().err
    for name in ("epoch", "noise_offset_type", "--wandb_run_name", "--sample_prompts"):
        assert re.search(rf"{name}( is the GUI's own|: no images| has no effect)", said), name
    metadata = Adapter.load(tmp_path / "out" / "last.safetensors").metadata
    args = {"conv_dim": "2", "conv_alpha": "1", "loraplus_lr_ratio": "4", "dropout": "0.0"}
    assert json.loads(metadata["ss_network_args"]) == args
    assert metadata["ss_learning_rate"] == "0.0001"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"save_model_as": "ckpt"}, {"save_state": True}])
def test_a_disk_that_is_really_full(basics, tmp_path, changes) -> None:
    """The system refuses files beyond a size: adapters do not fit, or only states do not."""
    options = {**basics, **changes, "save_every_n_steps": 1, "output_name": "x"}
    limit = 100_000 if "save_state" not in changes else 400_000
    guarded = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    guarded += "import sys; from lora_adapters.train.train_network import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", guarded, *command_line(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROGRAM.parents[1])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "cannot be written" in last
    left = sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".html")
    every = [*(f"x-step{step:08d}.safetensors" for step in (1, 2, 3)), "x.safetensors"]
    assert left == (every if "save_state" in changes else [])
