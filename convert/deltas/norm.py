"""The change of a normalisation layer (LyCORIS' `train_norm`)."""

from dataclasses import dataclass
from typing import ClassVar

from lora_adapters.convert.errors import AdapterError

from .full import Full


@dataclass(frozen=True, eq=False, repr=False)
class Norm(Full):
    """ΔW = w_norm and Δb = b_norm, both (channels,), of a LayerNorm or GroupNorm. Either may be None."""

    kind: ClassVar[str] = "norm"
    suffixes: ClassVar[tuple[str, ...]] = ("w_norm", "b_norm")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diff is not None and self.diff.ndim != 1:
            raise AdapterError(f"w_norm has the shape {list(self.diff.shape)}, expected one value for each channel")
