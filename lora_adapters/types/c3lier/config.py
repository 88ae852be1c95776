"""LoRA-C3Lier: the modules of LierLa and all convolutions."""

from dataclasses import dataclass, field
from typing import ClassVar

from lora_adapters.types.adapter_type import AdapterType
from lora_adapters.types.base import DEFAULT_CONV_DIM
from lora_adapters.types.lierla.config import LierLaConfig


@dataclass
class C3LierConfig(LierLaConfig):
    """LoRA of the modules of LierLa, and of the ResNet blocks, downsamplers and upsamplers of the U-Net.

    Convolutions larger than 1x1 have rank conv_dim and alpha conv_alpha; the ResNets' linear layers and 1x1
    convolutions have r and lora_alpha, as in kohya's trainer. If conv_dim is None, the larger convolutions have
    rank r.
    """

    covers_conv: ClassVar[bool] = True

    conv_dim: int | None = field(default=DEFAULT_CONV_DIM, metadata={"help": "Rank of convolutions larger than 1x1."})


class C3LierType(AdapterType):
    """Plain LoRA of LierLa's target modules and of ResNet blocks, downsamplers and upsamplers."""

    name, title, config = "C3Lier", "LoRA-C3Lier", C3LierConfig
    network_modules = ("c3lier",)


TYPE = C3LierType()
