import copy
import json
import pickle
import re
from pathlib import Path

import pytest

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.arguments import parse, parser, settings
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings, check_ranges
from lora_adapters.train.options.training import steps
from lora_adapters.train.options.unsupported import UNSUPPORTED, refuse
from lora_adapters.train.options.values import key_values

TRAIN = Path(__file__).parents[3] / "train"
METADATA_CODE = (TRAIN / "training" / "metadata.py").read_text()
READING = ("arguments", "config_file", "inert")  # modules of options/ that use options, where the others declare them
LEFT_OUT = ("fused_backward_pass",)  # always, and a warning says so: test_inert.py
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
    """Each option is used by some module besides those that declare it, or is refused or left out with a reason."""
    without = [re.search(r"without --(\w+)", case.why) for case in options_of(Settings)[name].inert]
    if name in UNSUPPORTED or any(found and found[1] in UNSUPPORTED for found in without) or name in LEFT_OUT:
        return
    elsewhere = [
        file
        for file in TRAIN.rglob("*.py")
        if not file.name.startswith("meta") and (file.parent.name != "options" or file.stem in READING)
    ]
    tables = options_of(Settings)[name].toml_name or name
    named = rf"(settings|options|self|args|first|subset|dataset|config)\.({name}|{tables})\b|[\"']{name}[\"']"
    used = any(re.search(named, file.read_text()) for file in elsewhere)
    if name in ("no_metadata", "training_comment") or name.startswith("metadata_"):  # these are metadata and no more
        used = f"settings.{name}" in METADATA_CODE or options_of(Settings)[name].metadata is not None
    assert used, f"--{name} is declared and nothing reads it"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_options_stop_at_once(name) -> None:
    other = {bool: True, int: 7, type(None): "x", str: "x"}[type(DEFAULTS[name])]
    options = settings()
    refuse(options)  # the defaults pass
    setattr(options, name, other)
    with pytest.raises(TrainingError, match=f"--{name}: "):
        refuse(options)


def test_config_file_and_command_line(tmp_path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[network]\nnetwork_dim = 8\nnetwork_args = ["conv_dim=4"]\n[x]\nlearning_rate = 1e-4\n')
    options = parse([f"--config_file={file.with_suffix('')}", "--network_dim=16"])
    assert (options.seed, options.network_dim, options.learning_rate) == (3, 16, 1e-4)
    assert options.network_args == ["conv_dim=4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 'x'", "seed cannot be 'x'"),
        ("learning_rate = nan", "learning_rate cannot be nan"),
        ("text_encoder_lr = [1e-4, 'x']", r"text_encoder_lr cannot be \[0.0001, 'x'\]"),
        ("text_encoder_lr = [[1]]", r"text_encoder_lr cannot be \[\[1\]\]"),
        ("seed = 1" + 400 * "0", "is not toml: it has a whole number of more than 64 bits"),
        ("cache_latents = 2", "cache_latents is true or false"),
        ("loss_type = 'l3'", "loss_type is one of l1, l2"),
        ("seed = ", "is not toml"),
    ],
)
def test_wrong_config_file(tmp_path, text, message) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(TrainingError, match=message):
        parse([f"--config_file={file}"])


def from_file(tmp_path, text: str, *line: str):
    file = tmp_path / "run.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return parse([f"--config_file={file}", *line])


def test_unknown_names_of_a_config_file_are_ignored_with_one_warning(tmp_path, caplog) -> None:
    text = "sed = 3\nbatch_size = 2\nlr_restart_cycles = 1\n[x]\nnetwork_dim = 8\nenable_contrastive = false\n"
    options = from_file(tmp_path, text)
    assert (options.network_dim, options.seed) == (8, None)
    assert caplog.messages == [
        f"{tmp_path / 'run.toml'}: not options of this trainer, and ignored: sed (did you mean seed?), "
        "batch_size (did you mean train_batch_size?), lr_restart_cycles (did you mean lr_scheduler_num_cycles?), "
        "enable_contrastive"
    ]


def test_a_file_of_all_defaults_changes_nothing(tmp_path, caplog) -> None:
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in DEFAULTS.items() if value is not None)
    assert vars(from_file(tmp_path, text)) == {**DEFAULTS, "config_file": str(tmp_path / "run.toml")}
    assert not caplog.messages
    assert from_file(tmp_path, "network_dim = 8.0").network_dim == 8  # as programs in JavaScript write whole numbers
    with pytest.raises(TrainingError, match=r"network_dim cannot be 8\.5"):
        from_file(tmp_path, "network_dim = 8.5")


def test_what_stands_for_not_given(tmp_path) -> None:
    text = 'reg_data_dir = ""\nmax_train_epochs = ""\nvae = false\nlog_prefix = ""\nnetwork_args = []\nxformers = false'
    options = vars(from_file(tmp_path, text, "--resume="))
    different = {name: value for name, value in options.items() if value != DEFAULTS[name]}
    assert different == {"config_file": str(tmp_path / "run.toml"), "network_args": []}


def test_the_last_of_two_sections_wins(tmp_path, caplog) -> None:
    assert from_file(tmp_path, '[a]\nresolution = "64"\n[b]\nresolution = "64"').resolution == "64"
    assert not caplog.messages
    assert from_file(tmp_path, "[a]\nseed = 1\n[b]\nseed = 2").seed == 2
    assert caplog.messages == [f"{tmp_path / 'run.toml'} gives seed twice: 2 is used, not 1"]


@pytest.mark.parametrize(
    ("text", "name", "used"),
    [
        ("huber_schedule = 'snrr'", "huber_schedule", "loss_type = 'huber'"),
        ("dynamo_backend = 'inducter'", "dynamo_backend", "torch_compile = true"),
        ("sample_sampler = 'eulera'", "sample_sampler", "sample_prompts = 'p.txt'"),
        ("log_with = 'tensorbord'", "log_with", "logging_dir = 'logs'"),
        ("zero_stage = 7", "zero_stage", "deepspeed = true"),
    ],
)
def test_wrong_values_that_nothing_reads_are_ignored(tmp_path, caplog, text, name, used) -> None:
    assert getattr(from_file(tmp_path, text), name) == DEFAULTS[name]
    assert re.search(rf"{name} is one of .* it is not used in this run, and ignored", caplog.text)
    with pytest.raises(TrainingError, match=f"{name} is one of"):
        from_file(tmp_path, f"{text}\n{used}")
    assert from_file(tmp_path, "save_precision = 'fp32'").save_precision == "float"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_file_may_have_a_byte_order_mark(tmp_path, encoding) -> None:
    (tmp_path / "run.toml").write_bytes('seed = 3\r\noutput_name = "\u732b"\r\n'.encode(encoding))
    options = parse([f"--config_file={tmp_path / 'run.toml'}"])
    assert (options.seed, options.output_name) == (3, "\u732b")


def test_windows_paths_of_a_config_file_are_explained(tmp_path) -> None:
    with pytest.raises(TrainingError, match=r"run\.toml is not toml: .*line 2.*: a backslash in .* write the path in"):
        from_file(tmp_path, 'seed = 1\nvae = "C:\\Users\\vae.pt"')


def test_secrets_are_not_written_to_a_config_file(tmp_path) -> None:
    file = tmp_path / "made.toml"
    with pytest.raises(SystemExit):
        parse(
            [f"--config_file={file}", "--output_config", "--wandb_api_key=abc", "--huggingface_token=def", "--seed=1"]
        )
    assert file.read_text() == "seed = 1\n"


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
    with pytest.raises(TrainingError, match="unrecognized arguments: --learning_rat=1; did you mean --learning_rate"):
        parse(["--learning_rat=1"])
    with pytest.raises(TrainingError, match="max_train_steps"):
        parse(["--max_train_steps=many"])


def test_settings_from_python(tmp_path) -> None:
    made = settings(output_dir=tmp_path, resolution=64, network_args={"unit": 4}, text_encoder_lr=1e-4)
    assert made.output_dir == str(tmp_path)
    assert made.resolution == "64"
    assert made.text_encoder_lr == [1e-4]
    assert key_values(made.network_args, "network_args") == {"unit": "4"}
    with pytest.raises(TrainingError, match=r"no option 'lr' \(did you mean learning_rate\?\)"):
        settings(lr=1)


def test_steps_as_count_share_and_percentage() -> None:
    assert [steps(text) for text in ("100", "0.1", "10%", "0", "1e3")] == [100, 0.1, 0.1, 0, 1000]
    for text in ("1.5", "-1", "ten", "inf", "nan", "inf%"):
        with pytest.raises(Exception, match="is not a number of steps"):
            steps(text)


def test_unambiguous_prefixes_are_taken_and_typing_errors_are_not() -> None:
    """As in kohya's parser, but for a name whose last letter alone is missing."""
    options = parse(["--pretrained_model=m", "--max_train_s", "5", "--network_dim=4", "--masked"])
    assert (options.pretrained_model_name_or_path, options.max_train_steps, options.masked_loss) == ("m", 5, True)
    with pytest.raises(TrainingError, match="ambiguous option: --lr_sch could match --lr_scheduler, --lr_scheduler_ty"):
        parse(["--lr_sch=linear"])
    assert parse(["--lr_scheduler=linear"]).lr_scheduler == "linear"  # the beginning of others, and a name itself
    with pytest.raises(TrainingError, match="unrecognized arguments: --see=1; did you mean --seed"):
        parse(["--see=1"])
    assert parse(["--training_comment=--see"]).training_comment == "--see"


def test_help_shows_every_default() -> None:
    made = parser()
    said = " ".join(made.format_help().split())
    listed = {name: one for name, one in options_of(Settings).items() if one.flag not in made.refused}
    assert said.count("(default: ") == len(listed)
    assert set(UNSUPPORTED) == {name for name in UNSUPPORTED if name not in listed}
    for name, option in listed.items():
        shown = {True: "on", False: "off"}[option.default] if option.is_flag else option.default
        if shown not in (None, ""):
            assert f"default: {shown})" in said, name
    assert "(default: chosen at random)" in said


def test_options_that_are_given_are_known_also_at_their_defaults(tmp_path) -> None:
    options = from_file(tmp_path, 'keep_tokens = 0\nseed = 3\nvae = ""', "--min_bucket_reso=256", "--resume=")
    assert options.given == {"config_file", "keep_tokens", "seed", "min_bucket_reso"}
    assert settings(max_bucket_reso=1024, vae=None).given == {"max_bucket_reso"}
    changed = settings(min_bucket_reso=256)
    changed.resolution = "64"
    assert changed.given_options() == {"min_bucket_reso": 256, "resolution": "64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_tokens": -1}, "--keep_tokens must be at least 0, not -1"),
        ({"caption_dropout_rate": 1.5}, "--caption_dropout_rate must be from 0 to 1, not 1.5"),
        ({"huber_c": 0}, "--huber_c must be above 0, not 0.0"),
        ({"seed": -1}, "--seed -1: seeds are 0 to 18446744073709551615; one is drawn without --seed"),
    ],
)
def test_ranges(options, message) -> None:
    check_ranges(settings())
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        check_ranges(settings(**options))


def test_a_copy_of_settings_knows_what_was_given() -> None:
    options = settings(seed=0, network_args={"unit": 4})
    for same in (copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert same == options
        assert same.given == {"seed", "network_args"}
