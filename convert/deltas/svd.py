"""The best approximation of low-rank changes by fewer components, from the factors alone.

With downᵀ = Q · R and orthonormal columns in Q, ΔW = up · down has the singular values of the narrow matrix up · Rᵀ. No
matrix of the size of the weight is ever made. The truncated SVD is the best approximation of its rank (Eckart and
Young, 1936).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.names import COMPONENTS, ModuleName

from .base import Delta
from .low_rank import LowRank
from .orthonormal import gram_svd, orthonormal
from .rank_choice import RankRule, by_error, fixed

_LITTLE, _SOME = 0.1, 0.3  # relative errors: 1 % and 9 % of the squared change are missing


class Fit(NamedTuple):
    """How well a change is met: squared Frobenius norms of all of it and of what is missing."""

    total: float
    missing: float

    @property
    def error(self) -> float:
        """The relative error, 0 to 1; 0 where there is nothing to meet."""
        return math.sqrt(max(self.missing, 0.0) / self.total) if self.total > 0 else 0.0


@dataclass(frozen=True)
class Rules:
    """Rules for linear layers with 1x1 convolutions, and for larger convolutions."""

    linear: RankRule
    conv: RankRule
    most: tuple[int | None, int | None] = (None, None)  # the largest ranks that they can choose, where that is known

    def of(self, one: LowRank) -> RankRule:
        """The rule for one module."""
        return self.linear if one.kernel == (1, 1) else self.conv


def rules(rank: int | None, conv_rank: int | None = None, target_error: float | None = None) -> Rules:
    """Fixed ranks, or with target_error the smallest that meet it (and not above rank, where that is given)."""
    if target_error is not None:
        return Rules(by_error(target_error, rank), by_error(target_error, rank if conv_rank is None else conv_rank))
    if rank is None:
        raise AdapterError("neither a rank nor a target error is given")
    conv = rank if conv_rank is None else conv_rank
    return Rules(fixed(rank), fixed(conv), (rank, conv))


def decompose(one: LowRank, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (out, n), singular values (n), Vᵀ (n, in·height·width) of ΔW, float64; n is its rank, at most one.rank.

    AdapterError where a factor has NaN or infinite numbers.
    """
    up, down = (factor.to(device) for factor in one.matrices())
    if not (math.isfinite(float(up.sum())) and math.isfinite(float(down.sum()))):
        raise AdapterError("there are NaN or infinite numbers in it")
    basis, root = orthonormal(down.T)
    u, values, vh = gram_svd(up.double() @ root.T * one.scale)
    return u, values, vh @ basis.T


def decompose_dense(
    one: LowRank, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `decompose`, but n is the shorter side of ΔW, and the signs of singular vectors are those of kohya's tools.

    They are arbitrary, and so is what clamping makes of them: it is kohya's only after LAPACK's SVD of the full matrix,
    which takes as long as kohya's.
    """
    matrix = one.delta().flatten(1).to(device)
    if not math.isfinite(float(matrix.sum())):
        raise AdapterError("there are NaN or infinite numbers in it")
    if not bool(matrix.any()):
        return matrix[:, :0], matrix[0, :0], matrix[:0]
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u.double(), values.double(), vh.double()


def by_size(one: LowRank) -> LowRank:
    """The same change with the components of its SVD, the largest first, shared evenly by both factors.

    up = U·√Σ and down = √Σ·Vᵀ (float64), with the alpha that it has: its first b components at the scale alpha/rank are
    the best approximation of rank b. Components that it does not need, as its rank is lower, get an `up` of zeros and
    keep a `down`, so that they can still learn. The signs are those with which the largest number of each column of
    `up` is positive.
    """
    u, values, vh = decompose(LowRank(one.down.cpu(), one.up.cpu(), float(one.rank)))  # at the scale 1
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    up, down = one.up.detach().cpu().double().flatten(1), one.down.detach().cpu().double().flatten(1)
    up, down = torch.zeros_like(up), down.clone()
    up[:, : len(values)], down[: len(values)] = u * signs * values.sqrt(), (values.sqrt() * signs).T * vh
    return LowRank(down.reshape(one.down.shape), up.reshape(one.up.shape), one.alpha)


def clamp(up: torch.Tensor, down: torch.Tensor, quantile: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors cut to ± the quantile of their values taken together (with their signs), as kohya's tools do."""
    if not 0 < quantile <= 1:
        raise AdapterError(f"clamp_quantile must be between 0 and 1, got {quantile:g}")
    high = float(torch.quantile(torch.cat([up.flatten(), down.flatten()]), quantile))
    return up.clamp(-abs(high), abs(high)), down.clamp(-abs(high), abs(high))


def product_norm_squared(up: torch.Tensor, down: torch.Tensor) -> float:
    """‖up · down‖², from the factors or the product, whichever is smaller."""
    if len(up) * down.shape[1] < up.shape[1] ** 2:
        return float((up.double() @ down.double()).square().sum())
    return float(((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum())


def reduced(
    one: LowRank, rule: RankRule, clamp_quantile: float | None = None, device: torch.device | None = None
) -> tuple[LowRank, Fit]:
    """The change with the number of components that the rule chooses, alpha = rank, and how well it fits."""
    u, values, vh = decompose(one, device) if clamp_quantile is None else decompose_dense(one, device)
    if len(values) == 0:  # no change at all: one component of zeros
        none = one.truncated(1)
        return LowRank(none.down.float(), torch.zeros_like(none.up).float(), 1.0), Fit(0.0, 0.0)
    rank = rule(values)
    energy = values.square()
    fit = Fit(float(energy.sum()), float(energy[rank:].sum()))
    up, down = u[:, :rank] * values[:rank], vh[:rank]
    if clamp_quantile is not None:
        up, down = clamp(up, down, clamp_quantile)
        missing = product_norm_squared(torch.cat([u * values, -up], dim=1), torch.cat([vh, down]))
        fit = Fit(fit.total, missing)
    shape, extra = one.down.shape[1:], (1,) * (one.up.ndim - 2)
    up, down = (factor.float().cpu().contiguous() for factor in (up, down))
    return LowRank(down.reshape(rank, *shape), up.reshape(*up.shape, *extra), float(rank)), fit


def as_written(
    fits: Mapping[ModuleName, Fit], exact: Mapping[ModuleName, Delta], written: Mapping[ModuleName, Delta]
) -> dict[ModuleName, Fit]:
    """The fits of what is written, where its dtype has rounded it: what that changed is missing too."""
    return {
        module: Fit(fit.total, fit.missing + _distance_squared(exact[module], written[module]))
        for module, fit in fits.items()
    }


def _distance_squared(one: Delta, other: Delta) -> float:
    """‖ΔW - ΔW'‖² of two changes of one weight, in full where they are no pairs."""
    if not (isinstance(one, LowRank) and isinstance(other, LowRank)):
        return 0.0 if one is other else float((one.delta() - other.delta()).double().square().sum())
    if one.alpha == other.alpha and one.up is other.up and one.down is other.down:
        return 0.0
    (up, down), (other_up, other_down) = one.matrices(torch.float64), other.matrices(torch.float64)
    ups = torch.cat([up * one.scale, other_up * -other.scale], dim=1)
    return max(product_norm_squared(ups, torch.cat([down, other_down])), 0.0)


def total(fits: Iterable[Fit]) -> Fit:
    """All of them as one."""
    listed = list(fits)
    return Fit(math.fsum(fit.total for fit in listed), math.fsum(fit.missing for fit in listed))


def report(fits: Mapping[ModuleName, Fit], more: str | None = None) -> str:
    """The relative error of each component and of all, with the worst module, and whether that is much.

    more: the options that keep more of the change, such as "a higher --new_rank"; None where there are none.
    """
    parts = []
    for component in COMPONENTS:
        mine = [fit for module, fit in fits.items() if module.component == component]
        if mine:
            parts.append(f"{component} {total(mine).error:.4g}")
    worst = max(fits, key=lambda module: fits[module].error)
    error = total(fits.values()).error
    parts.append(f"all {error:.4g}")
    return f"relative error: {', '.join(parts)} (largest: {fits[worst].error:.4g} in {worst})\n  {verdict(error)}" + (
        f"; {more} keeps more" if more is not None and error > _LITTLE else ""
    )


def verdict(error: float) -> str:
    """What a relative error means: whether it is much, and the share of the squared change that is kept.

    >>> verdict(0.39)
    'much of the change is lost (84.79 % of its squared norm is kept)'
    """
    amount = "little" if error <= _LITTLE else "some" if error <= _SOME else "much"
    return f"{amount} of the change is lost ({100 * (1 - error**2):.4g} % of its squared norm is kept)"


def with_rank_facts(modules: Mapping[ModuleName, Delta], metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with ss_network_args that name the rank of the larger convolutions, where there are any."""
    conv = [one.rank for one in modules.values() if isinstance(one, LowRank) and one.kernel != (1, 1)]
    if not conv:
        return dict(metadata)
    common = max(set(conv), key=conv.count)
    return {**metadata, "ss_network_args": f'{{"conv_dim": "{common}", "conv_alpha": "{float(common)}"}}'}
