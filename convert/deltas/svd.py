"""The best approximation of low-rank changes by fewer components, computed from the factors alone.

With downᵀ = Q · R and orthonormal columns in Q, ΔW = up · down has the singular values of the narrow matrix up · Rᵀ, so
that the dense ΔW is not needed. The truncated SVD is the best approximation of its rank (Eckart and Young, 1936).
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

_LITTLE, _SOME = 0.1, 0.3  # relative errors: 1 % and 9 % of the squared norm of the change are lost


class Fit(NamedTuple):
    """An approximation error: the squared Frobenius norms of the exact change and of the residual."""

    total: float
    missing: float

    @property
    def error(self) -> float:
        """The relative error, 0 to 1; 0 if the exact change is 0."""
        return math.sqrt(max(self.missing, 0.0) / self.total) if self.total > 0 else 0.0


@dataclass(frozen=True)
class Rules:
    """The rank rules for linear layers and 1x1 convolutions, and for larger convolutions."""

    linear: RankRule
    conv: RankRule
    most: tuple[int | None, int | None] = (None, None)  # the largest ranks that the two rules can choose, if known

    def of(self, pair: LowRank) -> RankRule:
        """The rule for one module."""
        return self.linear if pair.kernel == (1, 1) else self.conv


def rules(rank: int | None, conv_rank: int | None = None, target_error: float | None = None) -> Rules:
    """Rules for fixed ranks or, with target_error, for the smallest ranks that meet it (limited by rank if given)."""
    if target_error is not None:
        return Rules(by_error(target_error, rank), by_error(target_error, rank if conv_rank is None else conv_rank))
    if rank is None:
        raise AdapterError("give a rank or a target error")
    conv = rank if conv_rank is None else conv_rank
    return Rules(fixed(rank), fixed(conv), (rank, conv))


def decompose(pair: LowRank, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of ΔW, from the factors.

    Args:
        pair: A low-rank pair.
        device: The device of the computation; None for the device of the factors.

    Returns:
        U (out, n), singular values (n), Vᵀ (n, in·height·width), float64; n is the rank of ΔW, at most `pair.rank`.

    Raises:
        AdapterError: A factor has NaN or infinite values.
    """
    up, down = (factor.to(device) for factor in pair.matrices())
    if not (math.isfinite(float(up.sum())) and math.isfinite(float(down.sum()))):
        raise AdapterError("contains NaN or infinite values")
    basis, root = orthonormal(down.T)
    u, values, vh = gram_svd(up.double() @ root.T * pair.scale)
    return u, values, vh @ basis.T


def decompose_dense(
    pair: LowRank, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of ΔW, computed by LAPACK from the full matrix.

    The signs of singular vectors are arbitrary, but clamping depends on them. LAPACK's signs are the same as in kohya's
    tools. This is slower than `decompose`.

    Args:
        pair: A low-rank pair.
        device: The device of the computation; None for the device of the factors.

    Returns:
        The same as `decompose`, but n is the shorter side of ΔW.

    Raises:
        AdapterError: ΔW has NaN or infinite values.
    """
    matrix = pair.delta().flatten(1).to(device)
    if not math.isfinite(float(matrix.sum())):
        raise AdapterError("contains NaN or infinite values")
    if not bool(matrix.any()):
        return matrix[:, :0], matrix[0, :0], matrix[:0]
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u.double(), values.double(), vh.double()


def by_size(pair: LowRank) -> LowRank:
    """The same change, factorised by its SVD with the largest components first: up = U·√Σ and down = √Σ·Vᵀ.

    At the scale alpha/rank, the first b components are the best approximation of rank b. If ΔW has a lower rank than
    the pair, the remaining components have zeros in `up` and keep their `down`, so that they can still be trained.
    Signs are chosen so that the element of largest magnitude in each column of `up` is positive.

    Args:
        pair: The pair.

    Returns:
        A pair of the same rank and alpha, in float64 on the CPU.
    """
    u, values, vh = decompose(LowRank(pair.down.cpu(), pair.up.cpu(), float(pair.rank)))  # with scale 1
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    up, down = pair.up.detach().cpu().double().flatten(1), pair.down.detach().cpu().double().flatten(1)
    up, down = torch.zeros_like(up), down.clone()
    up[:, : len(values)], down[: len(values)] = u * signs * values.sqrt(), (values.sqrt() * signs).T * vh
    return LowRank(down.reshape(pair.down.shape), up.reshape(pair.up.shape), pair.alpha)


def clamp(up: torch.Tensor, down: torch.Tensor, quantile: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Clamp both factors to ± the quantile of all their (signed) values, as kohya's tools do."""
    if not 0 < quantile <= 1:
        raise AdapterError(f"clamp_quantile must be between 0 and 1, got {quantile:g}")
    high = float(torch.quantile(torch.cat([up.flatten(), down.flatten()]), quantile))
    return up.clamp(-abs(high), abs(high)), down.clamp(-abs(high), abs(high))


def product_norm_squared(up: torch.Tensor, down: torch.Tensor) -> float:
    """‖up · down‖², computed from the product or from Gram matrices of the factors, whichever are smaller."""
    if len(up) * down.shape[1] < up.shape[1] ** 2:
        return float((up.double() @ down.double()).square().sum())
    return float(((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum())


def reduced(
    pair: LowRank, rule: RankRule, clamp_quantile: float | None = None, device: torch.device | None = None
) -> tuple[LowRank, Fit]:
    """The best approximation of a pair at the rank that a rule chooses.

    Args:
        pair: The change.
        rule: Chooses the rank from the singular values.
        clamp_quantile: Clamp both factors as kohya's tools do (see `clamp`), which needs the SVD of the dense ΔW; None
            disables clamping.
        device: The device of the computation; None for the device of the factors.

    Returns:
        A pair in float32 on the CPU with alpha = rank, and its approximation error.

    Raises:
        AdapterError: A factor has NaN or infinite values.
    """
    u, values, vh = decompose(pair, device) if clamp_quantile is None else decompose_dense(pair, device)
    if len(values) == 0:  # ΔW is 0: return one component of zeros
        none = pair.truncated(1)
        return LowRank(none.down.float(), torch.zeros_like(none.up).float(), 1.0), Fit(0.0, 0.0)
    rank = rule(values)
    energy = values.square()
    fit = Fit(float(energy.sum()), float(energy[rank:].sum()))
    up, down = u[:, :rank] * values[:rank], vh[:rank]
    if clamp_quantile is not None:
        up, down = clamp(up, down, clamp_quantile)
        missing = product_norm_squared(torch.cat([u * values, -up], dim=1), torch.cat([vh, down]))
        fit = Fit(fit.total, missing)
    shape, extra = pair.down.shape[1:], (1,) * (pair.up.ndim - 2)
    up, down = (factor.float().cpu().contiguous() for factor in (up, down))
    return LowRank(down.reshape(rank, *shape), up.reshape(*up.shape, *extra), float(rank)), fit


def as_written(
    fits: Mapping[ModuleName, Fit], exact: Mapping[ModuleName, Delta], written: Mapping[ModuleName, Delta]
) -> dict[ModuleName, Fit]:
    """The approximation errors including the rounding to the dtype of the written changes."""
    return {
        module: Fit(fit.total, fit.missing + _distance_squared(exact[module], written[module]))
        for module, fit in fits.items()
    }


def _distance_squared(first: Delta, second: Delta) -> float:
    """‖ΔW - ΔW'‖² of two changes of one weight, from the dense ΔW unless both are low-rank pairs."""
    if not (isinstance(first, LowRank) and isinstance(second, LowRank)):
        return 0.0 if first is second else float((first.delta() - second.delta()).double().square().sum())
    if first.alpha == second.alpha and first.up is second.up and first.down is second.down:
        return 0.0
    (up, down), (second_up, second_down) = first.matrices(torch.float64), second.matrices(torch.float64)
    ups = torch.cat([up * first.scale, second_up * -second.scale], dim=1)
    return max(product_norm_squared(ups, torch.cat([down, second_down])), 0.0)


def total(fits: Iterable[Fit]) -> Fit:
    """The approximation error of all modules together."""
    listed = list(fits)
    return Fit(math.fsum(fit.total for fit in listed), math.fsum(fit.missing for fit in listed))


def report(fits: Mapping[ModuleName, Fit], more: str | None = None) -> str:
    """Format the approximation errors of an adapter: for each component, in total, and for the worst module.

    Args:
        fits: The errors, by module; at least one.
        more: Options that reduce the error, such as "a higher --new_rank"; None to suggest nothing.

    Returns:
        Two lines.
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
    """Describe a relative error in words.

    Args:
        error: ‖ΔW - ΔW'‖ / ‖ΔW‖.

    Returns:
        How much of the change is lost, and the share of the squared norm that is kept.

    >>> verdict(0.39)
    'much of the change is lost (84.79 % of its squared norm is kept)'
    """
    amount = "little" if error <= _LITTLE else "some" if error <= _SOME else "much"
    return f"{amount} of the change is lost ({100 * (1 - error**2):.4g} % of its squared norm is kept)"


def with_rank_facts(modules: Mapping[ModuleName, Delta], metadata: Mapping[str, str]) -> dict[str, str]:
    """Set ss_network_args in the metadata to the rank of the larger convolutions, if any are in the adapter."""
    conv = [change.rank for change in modules.values() if isinstance(change, LowRank) and change.kernel != (1, 1)]
    if not conv:
        return dict(metadata)
    common = max(set(conv), key=conv.count)
    return {**metadata, "ss_network_args": f'{{"conv_dim": "{common}", "conv_alpha": "{float(common)}"}}'}
