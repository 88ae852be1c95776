"""BOFT: rotations of the weight's rows in several stages, each of which mixes more distant rows (arXiv:2311.06243)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_adapters.convert.errors import AdapterError

from .oft import Rotation


@dataclass(frozen=True, eq=False, repr=False)
class BOFT(Rotation):
    """W + ΔW = rescale · B_m · ... · B₂ · B₁ · W, with `blocks` (stages, count, size, size); see `Rotation`.

    Stage i (from 0) places rows that are 2ⁱ · size / 2 apart next to each other and multiplies each block of `size`
    rows by its R.
    """

    kind: ClassVar[str] = "BOFT"
    block_shape: ClassVar[tuple[None, ...]] = (None, None, None, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        stages, count, size, _ = self.blocks.shape
        if size % 2 or count % 2 ** (stages - 1):
            raise AdapterError(
                f"oft_blocks has the shape {list(self.blocks.shape)}, expected (stages, count, size, size) "
                "with an even size and a count divisible by 2 ** (stages - 1)"
            )

    def _dense(self, base_weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        assert base_weight is not None
        base = base_weight.to(dtype).flatten(1)
        count, size = self.blocks.shape[1:3]
        rows = base
        for stage, turns in enumerate(self._rotations(dtype)):
            distance = 2**stage * size // 2
            rows = rows.reshape(-1, 2, distance, base.shape[1]).transpose(1, 2).reshape(count, size, -1)
            rows = torch.baddbmm(rows, turns, rows).reshape(-1, distance, 2, base.shape[1])
            rows = rows.transpose(1, 2).reshape(base.shape)
        return self._rescaled(rows.sub_(base), base)
