"""The noise schedule that a base model was trained with: from its scheduler config, by default Stable Diffusion's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_adapters.train.errors import TrainingError

SD_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 1000
PREDICTIONS = ("epsilon", "v_prediction")
_KNOWN = ("linear", "scaled_linear", "squaredcos_cap_v2")  # supported by training and by every sampler
FLOW = "flow_matching"  # prediction type of flow matching models; scheduler configs have no name for it
_OTHER_KINDS = {"EDM": "EDM's continuous noise levels", "FlowMatch": "flow matching"}


def betas(config: Mapping[str, Any]) -> dict[str, Any]:
    """The betas of a scheduler config as arguments for diffusers' schedulers."""
    arguments = {key: config.get(key, value) for key, value in SD_BETAS.items()}
    trained = config.get("trained_betas")
    if trained is not None:
        arguments["trained_betas"] = [float(beta) for beta in trained]
    return arguments


def ends_in_noise(config: Mapping[str, Any]) -> bool:
    """Whether the model was trained with zero terminal SNR: its last step is pure noise."""
    return bool(config.get("rescale_betas_zero_snr"))


def check_schedule_config(config: Mapping[str, Any], name: str, predictions: Sequence[str] = PREDICTIONS) -> None:
    """Raise TrainingError if the base model's noise schedule is not supported; `predictions` are its family's."""
    kind = str(config.get("_class_name", ""))
    if FLOW in predictions:
        if not kind.startswith("FlowMatch"):
            raise TrainingError(f"base model {name} needs a flow matching scheduler, but has {kind}")
        return
    for start, what in _OTHER_KINDS.items():
        if kind.startswith(start):
            raise TrainingError(f"base model {name} was trained with {what} ({kind}), which is not supported")
    steps = config.get("num_train_timesteps", STEPS)
    if steps != STEPS:
        raise TrainingError(f"base model {name} has {steps} timesteps in its scheduler config; {STEPS} are supported")
    schedule = betas(config)["beta_schedule"]
    if schedule not in _KNOWN:
        raise TrainingError(
            f"base model {name} has the beta_schedule {schedule} in its scheduler config; {', '.join(_KNOWN)} are "
            "supported"
        )


def check_prediction(prediction_type: str, name: str, predictions: Sequence[str] = PREDICTIONS) -> None:
    """Raise TrainingError if the family does not support the base model's prediction type."""
    if prediction_type not in predictions:
        raise TrainingError(
            f"base model {name} has the prediction_type {prediction_type} in its scheduler config; "
            f"{' and '.join(predictions)} are supported"
        )


def marks(path: Path) -> dict[str, Any]:
    """Scheduler config entries from a .safetensors checkpoint's marker keys for ComfyUI: v_pred and ztsnr."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    entries: dict[str, Any] = {}
    if "v_pred" in keys:
        entries["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        entries["rescale_betas_zero_snr"] = True
    return entries
