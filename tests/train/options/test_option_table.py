"""The documentation's tables of options are complete, and every test that they name is there."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

from lora_adapters.kohya_options import NETWORK_ARGS
from lora_adapters.train.data.config import DatasetConfig, SubsetConfig
from lora_adapters.train.data.schema import rules
from lora_adapters.train.generation.options import GenerateSettings
from lora_adapters.train.options.arguments import parser
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.options.unsupported import UNSUPPORTED

TESTS = Path(__file__).parents[2]
PAGE = TESTS.parent / "docs" / "pages" / "options.md"
# Options of kohya's trainer that few use. What is refused must be among these; what is not works, but is not listed.
RARE = {
    "tokenizer_cache_dir", "lowram", "highvram", "disable_mmap_load_safetensors", "mem_eff_attn", "full_fp16",
    "full_bf16", "fp8_base", "fp8_base_unet", "cpu_offload_checkpointing", "torch_compile", "dynamo_backend",
    "ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph", "deepspeed", "zero_stage",
    "offload_optimizer_device", "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path",
    "zero3_init_flag", "zero3_save_16bit_model", "fp16_master_weights_and_gradients", "use_8bit_adam",
    "use_lion_optimizer", "fused_backward_pass", "lr_scheduler_num_cycles", "lr_scheduler_power",
    "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio", "lr_scheduler_type", "lr_scheduler_args",
    "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength",
    "network_multiplier", "resize_interpolation", "color_aug", "random_crop", "face_crop_aug_range",
    "token_warmup_min", "token_warmup_step", "custom_attributes", "dataset_class", "debug_dataset",
    "caption_extention", "initial_epoch", "initial_step", "skip_until_initial_step", "huggingface_repo_id",
    "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token", "huggingface_repo_visibility",
    "save_state_to_huggingface", "resume_from_huggingface", "async_upload", "log_tracker_name", "log_tracker_config",
    "clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate",
    "split_mode", "apply_lg_attn_mask", "pos_emb_random_crop_rate", "enable_scaled_pos_embed",
    "wandb_run_name", "wandb_api_key", "log_config", "console_log_level", "console_log_file", "console_log_simple",
}  # fmt: skip


def script() -> ModuleType:
    """docs/options_page.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("options_page", TESTS.parent / "docs" / "options_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> list[tuple[str, list[str]]]:
    """(option, tests) of each row of the tables that names tests."""
    lines = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [(line[0].strip("| `"), re.findall(r"`([^`]+)`", line[-1])) for line in lines if "::" in line[-1]]


def test_the_page_is_written_from_the_options() -> None:
    text = PAGE.read_text(encoding="utf-8")
    page = script()
    assert page.render(page.kept_tests(text)) == text, "run python docs/options_page.py"
    shown = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert shown >= {option.flag.removeprefix("--") for option in options_of(GenerateSettings).values()}
    assert shown >= set(options_of(Settings)) | set(rules(SubsetConfig)) | set(rules(DatasetConfig)) | set(NETWORK_ARGS)


@cache
def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_option_that_users_expect_is_in_the_table() -> None:
    known = (
        set(vars(parser().parse_args([]))) | set(NETWORK_ARGS) | set(rules(SubsetConfig)) | set(rules(DatasetConfig))
    )
    listed = [name for name, _ in rows()]
    assert len(listed) == len(set(listed)), "an option has tests in two rows"
    assert known - set(listed) == RARE
    assert set(listed) <= known


def test_only_rare_options_are_refused() -> None:
    assert set(UNSUPPORTED) <= RARE


def test_every_test_that_the_table_names_is_there() -> None:
    named = [test for _, tests in rows() for test in tests]
    assert all(tests for _, tests in rows())
    missing = [test for test in named if test.split("::")[1] not in names_in(TESTS / test.split("::")[0])]
    assert not missing
