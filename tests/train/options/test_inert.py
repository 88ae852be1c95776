"""Options that change nothing, and values that kohya's trainer takes in silence, are no reason not to train."""

import pytest

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.models.memory import check_machine
from lora_adapters.train.options.arguments import parser, settings
from lora_adapters.train.options.inert import leave_out_inert
from lora_adapters.train.training.samples import wants_samples
from lora_adapters.train.training.setup import check

DEFAULTS = vars(parser().parse_args([]))

# (options, what each is afterwards where that is not its default, what is said)
LEFT_OUT = [
    ({"sample_every_n_steps": 0}, {}, "--sample_every_n_steps is left out: 0 draws no sample images"),
    ({"sample_every_n_epochs": -1}, {}, "--sample_every_n_epochs is left out: -1 draws no sample images"),
    ({"sample_every_n_steps": 5000}, {}, "--sample_every_n_steps: no sample images are drawn without --sample_prom"),
    ({"sample_at_first": True}, {}, "--sample_at_first: no sample images are drawn without --sample_prompts"),
    ({"save_every_n_epochs": 0}, {}, "--save_every_n_epochs is left out: 0 is taken as not given"),
    ({"save_every_n_steps": 0}, {}, "--save_every_n_steps is left out"),
    ({"max_train_epochs": 0}, {}, "--max_train_epochs is left out"),
    ({"validate_every_n_steps": 0}, {}, "--validate_every_n_steps is left out"),
    ({"validate_every_n_epochs": 0}, {}, "--validate_every_n_epochs is left out"),
    ({"max_validation_steps": 0}, {}, "--max_validation_steps is left out"),
    ({"clip_skip": 0}, {}, "--clip_skip is left out"),
    ({"lr_scheduler_timescale": 0}, {}, "--lr_scheduler_timescale is left out"),
    ({"vae_batch_size": 0}, {}, "--vae_batch_size is left out: 0 is taken as 1"),
    ({"adaptive_noise_scale": 0.1}, {}, "--adaptive_noise_scale is left out: it has no effect without --noise_offset"),
    ({"adaptive_noise_scale": 0.1, "noise_offset": 0}, {"noise_offset": 0}, "--adaptive_noise_scale is left out"),
    ({"huber_c": 0}, {}, "--huber_c is left out: it has no effect with --loss_type l2"),
    ({"fused_backward_pass": True}, {}, "--fused_backward_pass is left out"),
    ({"initial_epoch": 1}, {}, "--initial_epoch is left out: a run starts there anyway"),
    ({"initial_step": 0, "skip_until_initial_step": True}, {}, "--initial_step is left out"),
    ({"zero_stage": 3}, {}, "--zero_stage is left out: it has no effect without --deepspeed"),
    ({"offload_optimizer_device": "cpu"}, {}, "--offload_optimizer_device is left out"),
    ({"offload_param_nvme_path": "/x"}, {}, "--offload_param_nvme_path is left out"),
    ({"fp16_master_weights_and_gradients": True}, {}, "--fp16_master_weights_and_gradients is left out"),
]
# Taken without a word: at values that change nothing, and options that apply together.
TAKEN = [
    {"noise_offset": 0.05, "multires_noise_iterations": 6, "multires_noise_discount": 0.3},
    {"noise_offset": 0.05, "adaptive_noise_scale": 0.01},
    {"noise_offset": 0, "multires_noise_iterations": 0, "ip_noise_gamma": 0, "min_snr_gamma": 0},
    {"lr_scheduler": "constant_with_warmup"},
    {"lr_scheduler": "constant", "lr_warmup_steps": 0, "lr_decay_steps": 0},
    {"lowram": True, "highvram": True},
    {"lowram": False, "highvram": False, "mem_eff_attn": False, "xformers": False, "full_fp16": False},
    {"mem_eff_attn": True},
    {"disable_mmap_load_safetensors": True, "persistent_data_loader_workers": True},
    {"max_data_loader_n_workers": 0, "ddp_timeout": 0, "ddp_static_graph": False},
    {"save_n_epoch_ratio": 0, "save_last_n_epochs": 0, "save_last_n_steps": 0, "save_last_n_epochs_state": 0},
    {"max_grad_norm": 0, "scale_weight_norms": 0, "network_dropout": 0, "network_alpha": 0},
    {"keep_tokens": 0, "caption_dropout_rate": 0, "caption_dropout_every_n_epochs": 0, "token_warmup_step": 0},
    {"prior_loss_weight": 0, "validation_split": 0, "min_timestep": 0, "max_timestep": 1000},
    {"network_args": [], "optimizer_args": [], "lr_scheduler_args": [], "base_weights": []},
    {"no_half_vae": True, "no_metadata": True, "log_config": True, "console_log_simple": True},
    {"v2": False, "v_parameterization": False, "zero_terminal_snr": False, "v_pred_like_loss": 0},
    {"huber_schedule": "constant", "huber_c": 0.5, "loss_type": "l2"},
    {"cache_info": True, "dataset_repeats": 4, "skip_cache_check": True},
    {"max_token_length": 75, "async_upload": False, "resume_from_huggingface": False},
]


@pytest.mark.parametrize(("options", "left", "message"), LEFT_OUT, ids=lambda value: str(value)[:50])
def test_what_changes_nothing_is_left_out_with_a_warning(options, left, message, caplog) -> None:
    chosen = settings(**options)
    leave_out_inert(chosen)
    assert vars(chosen) == {**DEFAULTS, **left}
    assert message in caplog.text
    assert not wants_samples(chosen)


@pytest.mark.parametrize("options", [*(row[0] for row in LEFT_OUT), *TAKEN], ids=lambda value: str(value)[:50])
def test_a_run_begins_with_it(basics, options) -> None:
    check(settings(**{**basics, **options}))


@pytest.mark.parametrize("options", TAKEN, ids=lambda value: str(value)[:50])
def test_it_is_taken_without_a_word(options, caplog) -> None:
    chosen = settings(**options)
    leave_out_inert(chosen)
    assert vars(chosen) == vars(settings(**options))
    assert not caplog.messages


@pytest.mark.parametrize(
    "options",
    [
        {"deepspeed": True, "zero_stage": 3},
        {"initial_epoch": 2},
        {"initial_step": 5, "skip_until_initial_step": True},
        {"blocks_to_swap": 3},
        {"save_every_n_steps": -1},
        {"train_batch_size": 0},
    ],
    ids=str,
)
def test_what_would_change_the_run_is_refused_as_before(basics, options) -> None:
    with pytest.raises(TrainingError):
        check(settings(**{**basics, **options}))


def test_full_fp16_keeps_what_is_trained_in_fp32_and_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_machine(settings(full_fp16=True, mixed_precision="fp16"))
    assert "--full_fp16: the adapter's weights, gradients and optimizer state stay in fp32" in caplog.text
    with pytest.raises(TrainingError, match="--full_fp16 needs --mixed_precision fp16"):
        check_machine(settings(full_fp16=True))
