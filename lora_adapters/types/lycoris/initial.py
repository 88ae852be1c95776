"""The initial changes of LyCORIS' algorithms for training: they have the right shapes, and ΔW = 0.

Shapes and random values are those of LyCORIS (github.com/KohakuBlueleaf/LyCORIS, `lycoris/modules`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from lora_adapters.convert.deltas import BOFT, IA3, OFT, Delta, DoRA, Full, GLoRA, Hadamard, Kronecker, Norm, Tucker
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.with_scalar import WithScalar
from lora_adapters.convert.errors import AdapterError

from .operations import NORMS, base_weight, weight_shape

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AlgorithmOptions:
    """An algorithm and its options, with LyCORIS' names and meanings.

    Attributes:
        algo: lora (or locon), loha, lokr, full, ia3, glora, diag-oft or boft.
        factor: LoKr: see `factorization`.
        decompose_both: LoKr: w1 may be low-rank too.
        full_matrix: LoKr: w1 and w2 are never low-rank.
        unbalanced_factorization: LoKr: w1 has the larger part of the output channels.
        use_tucker: Use Tucker decomposition for kernels.
        use_scalar: Train a scalar that starts at 0, instead of a matrix of zeros.
        dora_wd: Train DoRA magnitudes.
        wd_on_output: Magnitudes are for output channels, otherwise for input channels.
        rs_lora: Scale by alpha/√rank.
        train_on_input: IA3: scale input channels.
        constraint: OFT and BOFT: the limit of the rotations; 0 for no limit.
        rescaled: OFT and BOFT: train a scale for each row.
    """

    algo: str = "lora"
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced_factorization: bool = False
    use_tucker: bool = False
    use_scalar: bool = False
    dora_wd: bool = False
    wd_on_output: bool = True
    rs_lora: bool = False
    train_on_input: bool = False
    constraint: float = 0.0
    rescaled: bool = False

    def __post_init__(self) -> None:
        if self.algo not in ALGORITHMS:
            raise AdapterError(f"unknown algo {self.algo}: choose one of {', '.join(ALGORITHMS)}")
        if self.factor == 0 or self.factor < -1:
            raise AdapterError(f"factor is {self.factor}: it must be at least 1, or -1 for factors of similar size")
        if self.constraint < 0:
            raise AdapterError(f"constraint is {self.constraint}: it must be at least 0 (0 means no limit)")
        own = OPTIONS[self.algo]
        for option in fields(self):
            if option.name not in ("algo", *own) and getattr(self, option.name) != option.default:
                known = ", ".join(own) or "none"
                raise AdapterError(f"{option.name}: algo {self.algo} has no such option; it has {known}")


_OF_PAIRS = ("use_tucker", "use_scalar", "dora_wd", "wd_on_output", "rs_lora")
_OF_LOKR = ("factor", "decompose_both", "full_matrix", "unbalanced_factorization")
OPTIONS = {
    "lora": _OF_PAIRS,
    "locon": _OF_PAIRS,
    "loha": _OF_PAIRS,
    "lokr": (*_OF_LOKR, *_OF_PAIRS),
    "full": (),
    "ia3": ("train_on_input",),
    "glora": ("use_scalar", "rs_lora"),
    "diag-oft": ("constraint", "rescaled"),
    "boft": ("constraint", "rescaled"),
}  # fmt: skip


def initial_change(layer: nn.Module, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    """The change of a layer at the start of a training; ΔW and Δb are 0.

    Args:
        layer: A linear layer, a convolution, or a normalisation (which gets a full difference with all algorithms).
        rank: LyCORIS' dim; OFT and BOFT derive the block size from it.
        alpha: The alpha; 0 means the rank. OFT, IA3, full differences and norms have no alpha.
        options: The algorithm and its options.

    Returns:
        A change with float32 tensors on the layer's device.

    Raises:
        AdapterError: The layer has an unsupported type, or the algorithm cannot divide its channels.
    """
    if isinstance(layer, NORMS):
        return _norm(layer)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise AdapterError(f"{type(layer).__name__} is not a linear layer, convolution or normalisation")
    alpha = alpha or float(rank)
    scaled = alpha * math.sqrt(rank) if options.rs_lora else alpha
    with torch.device(_device(layer)):
        change = ALGORITHMS[options.algo](layer, rank, scaled, options)
        if options.use_scalar:
            change = WithScalar(change, torch.zeros(()))
        return DoRA(change, initial_magnitude(layer, options.wd_on_output)) if options.dora_wd else change


def initial_magnitude(layer: nn.Module, on_output: bool) -> torch.Tensor:
    """The norm of each output channel of a layer's weight, (out, 1, ...), or of each input channel, (1, in, ...)."""
    weight = base_weight(layer, _device(layer)).float()
    kept = 0 if on_output else 1
    return torch.linalg.vector_norm(weight, dim=[i for i in range(weight.ndim) if i != kept], keepdim=True)


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Split a size into two factors, as LyCORIS does.

    Args:
        size: The number to factor.
        factor: One of the factors if it divides the size; otherwise the largest allowed value of the smaller factor. -1
            chooses factors of similar size.

    Returns:
        The smaller and the larger factor.

    >>> factorization(128), factorization(128, 4), factorization(360, 16), factorization(127, 4)
    ((8, 16), (4, 32), (12, 30), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    largest = size if factor < 0 else factor
    small = max(part for part in range(1, math.isqrt(size) + 1) if size % part == 0 and part <= largest)
    return small, size // small


def butterfly_factors(size: int, factor: int) -> tuple[int, int] | None:
    """The block size of BOFT: the largest even size for which the number of blocks is a power of two.

    Args:
        size: The number of output channels.
        factor: The largest block size.

    Returns:
        The block size and the number of blocks; None if no block size is possible.

    >>> butterfly_factors(320, 16), butterfly_factors(36, 4), butterfly_factors(7, 4)
    ((10, 32), None, None)
    """
    for block in range(factor - factor % 2, 1, -2):
        count, rest = divmod(size, block)
        if not rest and count.bit_count() == 1:
            return block, count
    return None


# --- the algorithms ---------------------------------------------------------------------------------------------------


def _device(layer: nn.Module) -> torch.device:
    device = next(layer.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _kaiming(*shape: int) -> torch.Tensor:
    tensor = torch.empty(shape)
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
    return tensor


def _normal(std: float, *shape: int) -> torch.Tensor:
    return torch.randn(shape).mul_(std)


def _sizes(layer: Any, options: AlgorithmOptions) -> tuple[int, int, Shape, bool]:
    """Output and input channels, the kernel, and whether the kernel is Tucker-decomposed."""
    out, into, *kernel = weight_shape(layer)
    return out, into, tuple(kernel), options.use_tucker and math.prod(kernel) > 1


def _lora(layer: Any, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    out, into, kernel, tucker = _sizes(layer, options)
    ones = (1,) * len(kernel)
    up = _kaiming(out, rank, *ones) if options.use_scalar else torch.zeros(out, rank, *ones)
    if tucker:
        return Tucker(_kaiming(rank, into, *ones), _kaiming(rank, rank, *kernel), up, alpha)
    return LowRank(_kaiming(rank, into, *kernel), up, alpha)


def _loha(layer: Any, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    out, into, kernel, tucker = _sizes(layer, options)
    a, b = ((rank, out), (rank, into)) if tucker else ((out, rank), (rank, into * math.prod(kernel)))
    cores = [_normal(0.1, rank, rank, *kernel) for _ in range(2)] if tucker else (None, None)
    w2_a = _normal(0.1, *a) if options.use_scalar else torch.zeros(a)
    return Hadamard(_normal(0.1, *a), _normal(1, *b), w2_a, _normal(1, *b), alpha, *cores)


def _lokr(layer: Any, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    out, into, kernel, tucker = _sizes(layer, options)
    rows, columns = factorization(out, options.factor), factorization(into, options.factor)
    if options.unbalanced_factorization:
        rows = rows[1], rows[0]
    parts: dict[str, Any] = {"w1": None, "w2": None}
    whole = options.full_matrix
    if options.decompose_both and rank < max(rows[0], columns[0]) / 2 and not whole:
        parts |= {"w1_a": _kaiming(rows[0], rank), "w1_b": _kaiming(rank, columns[0])}
    else:
        parts["w1"] = _kaiming(rows[0], columns[0])
    zeros = _kaiming if options.use_scalar else torch.zeros
    if whole or rank >= max(rows[1], columns[1]) / 2:
        parts["w2"] = zeros(rows[1], columns[1], *kernel)
    elif tucker:
        parts |= {"t2": _kaiming(rank, rank, *kernel), "w2_a": _kaiming(rank, rows[1]), "w2_b": zeros(rank, columns[1])}
    else:
        parts |= {"w2_a": _kaiming(rows[1], rank), "w2_b": zeros(rank, columns[1] * math.prod(kernel))}
    if parts["w1"] is not None and parts["w2"] is not None:
        alpha = float(rank)  # as LyCORIS writes it: without a low-rank factor the scale is 1
    return Kronecker(alpha=alpha, **parts)


def _full(layer: Any, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    bias = None if layer.bias is None else torch.zeros(tuple(layer.bias.shape))
    return Full(torch.zeros(weight_shape(layer)), bias)


def _norm(layer: Any) -> Delta:
    with torch.device(_device(layer)):
        bias = None if getattr(layer, "bias", None) is None else torch.zeros(tuple(layer.bias.shape))
        return Norm(torch.zeros(weight_shape(layer)), bias)


def _ia3(layer: Any, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    out, into, kernel, _ = _sizes(layer, options)
    channels = into if options.train_on_input else out
    return IA3(torch.zeros((1, channels, *(1,) * len(kernel)) if kernel else (channels,)), options.train_on_input)


def _glora(layer: Any, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    out, into, kernel, _ = _sizes(layer, options)
    ones = (1,) * len(kernel)
    zeros = _kaiming if options.use_scalar else torch.zeros
    a1, b1 = _kaiming(into, rank, *ones), _kaiming(out, rank, *ones)
    return GLoRA(a1, zeros(rank, into, *ones), b1, zeros(rank, into, *kernel), alpha)


def _rescale(layer: Any, options: AlgorithmOptions) -> torch.Tensor | None:
    out, *rest = weight_shape(layer)
    return torch.ones(out, *(1,) * len(rest)) if options.rescaled else None


def _oft(layer: Any, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    size, count = factorization(weight_shape(layer)[0], rank)
    return OFT(torch.zeros(count, size, size), options.constraint, _rescale(layer, options))


def _boft(layer: Any, rank: int, alpha: float, options: AlgorithmOptions) -> Delta:
    out = weight_shape(layer)[0]
    factors = butterfly_factors(out, rank)
    if factors is None:
        raise AdapterError(
            f"algo boft with rank {rank}: {out} output channels are not an even block size of at most {rank} times a "
            "power of two; use another network_dim"
        )
    size, count = factors
    stages = (count - 1).bit_count() + 1
    return BOFT(torch.zeros(stages, count, size, size), options.constraint, _rescale(layer, options))


ALGORITHMS: dict[str, Callable[[Any, int, float, AlgorithmOptions], Delta]] = {
    "lora": _lora,
    "locon": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
    "ia3": _ia3,
    "glora": _glora,
    "diag-oft": _oft,
    "boft": _boft,
}
