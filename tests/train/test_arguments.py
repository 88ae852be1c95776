import re
from pathlib import Path

import pytest

from lora_adapters.train import options_output
from lora_adapters.train.arguments import key_values, parse, parser, settings
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options_training import steps
from lora_adapters.train.unsupported import UNSUPPORTED, refuse

TRAIN = Path(__file__).parents[2] / "train"
METADATA_CODE = (TRAIN / "metadata.py").read_text()
DEFAULTS = vars(parser().parse_args([]))


def test_defaults_are_those_that_users_know() -> None:
    expected = {
        "learning_rate": 2e-6, "max_train_steps": 1600, "network_alpha": 1, "network_dim": None, "seed": None,
        "mixed_precision": "no", "max_data_loader_n_workers": 8, "lr_scheduler": "constant",
        "prior_loss_weight": 1.0,
        "huber_c": 0.1,
        "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64, "caption_extension": ".caption",
        "save_model_as": "safetensors", "multires_noise_discount": 0.3, "sample_sampler": "ddim", "max_grad_norm": 1.0,
    }  # fmt: skip
    assert {name: DEFAULTS[name] for name in expected} == expected
    assert len(DEFAULTS) >= 196


@pytest.mark.parametrize("name", DEFAULTS)
def test_no_option_is_read_and_ignored(name) -> None:
    """Each option is used by some module besides those that declare it, or is refused with a reason."""
    if name in UNSUPPORTED:
        return
    elsewhere = [file for file in TRAIN.glob("*.py") if not file.name.startswith(("options_", "unsupported", "meta"))]
    named = rf"(settings|options|self|args|first)\.{name}\b|[\"']{name}[\"']|\b{name}: .* = option\("
    used = any(re.search(named, file.read_text()) for file in elsewhere)
    if name.startswith("metadata_"):
        used = name.removeprefix("metadata_") in options_output.METADATA and "metadata_{name}" in METADATA_CODE
    if name in ("no_metadata", "training_comment"):  # these are metadata and no more
        used = f"settings.{name}" in METADATA_CODE or f'"{name}"' in METADATA_CODE
    assert used, f"--{name} is declared and nothing reads it"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_stop_at_once(name) -> None:
    other = {bool: True, int: 7, type(None): "x", str: "x"}[type(DEFAULTS[name])]
    options = settings()
    refuse(options, DEFAULTS)  # the defaults pass
    setattr(options, name, other)
    with pytest.raises(TrainingError, match=f"--{name}: "):
        refuse(options, DEFAULTS)


def test_config_file_and_command_line(tmp_path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[network]\nnetwork_dim = 8\nnetwork_args = ["conv_dim=4"]\n[x]\nlearning_rate = 1e-4\n')
    options = parse([f"--config_file={file.with_suffix('')}", "--network_dim=16"])
    assert (options.seed, options.network_dim, options.learning_rate) == (3, 16, 1e-4)
    assert options.network_args == ["conv_dim=4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed = 3", "there is no option 'sed'"),
        ("seed = 'x'", "seed cannot be 'x'"),
        ("learning_rate = nan", "learning_rate cannot be nan"),
        ("text_encoder_lr = [1e-4, 'x']", r"text_encoder_lr cannot be \[0.0001, 'x'\]"),
        ("text_encoder_lr = [[1]]", r"text_encoder_lr cannot be \[\[1\]\]"),
        ("seed = 1" + 400 * "0", "is not toml: it has a whole number of more than 64 bits"),
        ("cache_latents = 2", "cache_latents is true or false"),
        ("loss_type = 'l3'", "loss_type is one of l1, l2"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "gives seed twice"),
        ("seed = ", "is not toml"),
    ],
)
def test_wrong_config_file(tmp_path, text, message) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(TrainingError, match=message):
        parse([f"--config_file={file}"])


def test_missing_config_file() -> None:
    with pytest.raises(TrainingError, match=r"nowhere\.toml does not exist"):
        parse(["--config_file=nowhere"])


def test_output_config_is_read_back(tmp_path, capsys) -> None:
    words = ["--network_dim=8", "--cache_latents", "--network_args", "conv_dim=4", "--lr_warmup_steps=10%"]
    words += ['--training_comment=a "quoted" word', "--learning_rate=0.0001"]
    file = f"--config_file={tmp_path / 'made'}"
    with pytest.raises(SystemExit):
        parse([file, "--output_config", *words])
    made, direct = parse([file]), parse(words)
    made.config_file = None
    assert made == direct
    with pytest.raises(TrainingError, match="exists already"):
        parse([file, "--output_config"])


def test_mistakes_on_the_command_line() -> None:
    with pytest.raises(TrainingError, match="unrecognized arguments: --learning_rat"):
        parse(["--learning_rat=1"])
    with pytest.raises(TrainingError, match="max_train_steps"):
        parse(["--max_train_steps=many"])


def test_settings_from_python(tmp_path) -> None:
    made = settings(output_dir=tmp_path, resolution=64, network_args={"unit": 4}, text_encoder_lr=1e-4)
    assert made.output_dir == str(tmp_path)
    assert made.resolution == "64"
    assert made.text_encoder_lr == [1e-4]
    assert key_values(made.network_args, "network_args") == {"unit": "4"}
    with pytest.raises(TrainingError, match="no option 'lr'"):
        settings(lr=1)


def test_steps_as_count_share_and_percentage() -> None:
    assert [steps(text) for text in ("100", "0.1", "10%", "0", "1e3")] == [100, 0.1, 0.1, 0, 1000]
    for text in ("1.5", "-1", "ten", "inf", "nan", "inf%"):
        with pytest.raises(Exception, match="is not a number of steps"):
            steps(text)
