"""The loss of a training step, with weights for timesteps, masks and images."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.moving import moved
from lora_adapters.train.objective.noise import huber_width, signal_to_noise, velocity_share
from lora_adapters.train.options.settings import Settings

_LARGEST_SNR = 1000.0  # near t=0 the SNR grows without bound; weights use at most this SNR


@dataclass(frozen=True)
class LossOptions:
    """The options of the loss, named as on the command line; `v_prediction` is the base model's."""

    v_prediction: bool = False
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    min_snr_gamma: float | None = None
    debiased_estimation_loss: bool = False
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None

    @property
    def objective(self) -> str:
        """The name of the objective, see `objectives`."""
        return "v_prediction" if self.v_prediction else "epsilon"

    @classmethod
    def of(cls, settings: Settings, v_prediction: bool) -> "LossOptions":
        """The loss options of a run. TrainingError for options that contradict the prediction type."""
        if settings.v_pred_like_loss and v_prediction:
            raise TrainingError("--v_pred_like_loss is for models that predict noise; this one predicts v")
        if settings.scale_v_pred_loss_like_noise_pred and not v_prediction:
            raise TrainingError(
                "--scale_v_pred_loss_like_noise_pred is for models that predict v; this one predicts noise"
            )
        return cls(
            v_prediction=v_prediction,
            loss_type=settings.loss_type,
            huber_schedule=settings.huber_schedule,
            huber_c=settings.huber_c,
            huber_scale=settings.huber_scale,
            min_snr_gamma=settings.min_snr_gamma,
            debiased_estimation_loss=settings.debiased_estimation_loss,
            scale_v_pred_loss_like_noise_pred=settings.scale_v_pred_loss_like_noise_pred,
            v_pred_like_loss=settings.v_pred_like_loss,
        )


@dataclass(frozen=True)
class TimestepTables:
    """Loss weights and Huber widths for all timesteps, computed once and kept on the device.

    weights: factors of the loss, float32 (steps,). widths: Huber's c, float32 (steps,), or None for other losses.
    """

    weights: torch.Tensor
    widths: torch.Tensor | None = None

    def weight_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The loss weights (n,) at timesteps (n,)."""
        return self.weights[timesteps]

    def width_at(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Huber's c (n,) at timesteps (n,), or None for other losses."""
        return None if self.widths is None else self.widths[timesteps]

    @classmethod
    def of(
        cls, alphas_cumprod: torch.Tensor, options: LossOptions, device: torch.device | str = "cpu"
    ) -> "TimestepTables":
        """Compute the tables from a schedule's `alphas_cumprod` (steps,), on the CPU in float64."""
        alphas = alphas_cumprod.cpu()
        weights = timestep_weights(signal_to_noise(alphas), options).to(device, torch.float32)
        if options.loss_type not in ("huber", "smooth_l1"):
            return cls(weights)
        schedule = (options.huber_schedule, options.huber_c, options.huber_scale)
        return cls(weights, huber_width(torch.arange(len(alphas)), alphas, *schedule).to(device, torch.float32))


def loss_per_sample(
    predicted: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    tables: Any,
    loss_type: str = "l2",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each sample, weighted by its timestep.

    Args:
        predicted: (n, channels, height, width).
        target: The same shape.
        timesteps: (n,), on the device of the `tables`.
        tables: The tables of the objective, such as `TimestepTables`.
        loss_type: l2, l1, huber or smooth_l1.
        mask: (n, 1, h, w) or (n, h, w) in [0, 1], resized by area; None to count all pixels.

    Returns:
        (n,) in float32.
    """
    width = tables.width_at(timesteps)
    shaped = None if width is None else width.view(-1, 1, 1, 1)
    loss = elementwise(predicted.float(), target.float(), loss_type, shaped)
    if mask is not None:
        loss = loss * resized_mask(mask, loss)
    return loss.mean(dim=(1, 2, 3)) * tables.weight_at(timesteps)


def elementwise(predicted: torch.Tensor, target: torch.Tensor, kind: str, width: torch.Tensor | None) -> torch.Tensor:
    """The unreduced loss. huber: 2c(sqrt(d^2 + c^2) - c), close to l2 for small d; smooth_l1: without the factor c."""
    difference = predicted - target
    if kind == "l2":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    assert width is not None
    curve = 2 * ((difference.square() + width.square()).sqrt() - width)
    return width * curve if kind == "huber" else curve


def resized_mask(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Resize a mask (n, 1, h, w) or (n, h, w) by area to the size of `like`: (n, 1, height, width)."""
    mask = mask if mask.dim() == 4 else mask.unsqueeze(1)
    return F.interpolate(moved(mask, like), size=like.shape[2:], mode="area")


def timestep_weights(snr: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """Loss weights of timesteps, computed from their signal-to-noise ratio.

    min-SNR (arXiv 2303.09556) is min(snr, gamma) / snr for noise prediction, and / (snr + 1) for v-prediction. Debiased
    estimation (arXiv 2310.08442) is 1 / sqrt(snr) for noise prediction, and 1 / (snr + 1) for v-prediction. At an SNR
    of 0 (zero terminal SNR) with noise prediction, min-SNR is 1, and debiased estimation, which diverges there, is set
    to 1.

    Args:
        snr: (n,), float64, not negative.
        options: The options that turn weightings on.

    Returns:
        (n,), float64; all 1 if no weighting is on.
    """
    weights = torch.ones_like(snr)
    share = velocity_share(snr.clamp(max=_LARGEST_SNR))
    if options.min_snr_gamma:
        clipped = snr.clamp(max=options.min_snr_gamma)
        ratio = clipped / (snr + 1) if options.v_prediction else (options.min_snr_gamma / snr).clamp(max=1.0)
        weights = weights * ratio
    if options.scale_v_pred_loss_like_noise_pred:
        weights = weights * share
    if options.v_pred_like_loss:
        like_v = torch.where(snr > 0, 1 / share, torch.zeros_like(snr))
        weights = weights * (1 + options.v_pred_like_loss * like_v)
    if options.debiased_estimation_loss:
        capped = snr.clamp(max=_LARGEST_SNR)
        noise = torch.where(capped > 0, capped.rsqrt(), torch.ones_like(capped))
        weights = weights * (1 / (capped + 1) if options.v_prediction else noise)
    return weights
