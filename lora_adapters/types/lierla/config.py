"""LoRA-LierLa: kohya's default."""

from dataclasses import dataclass

from lora_adapters.types.adapter_type import AdapterType
from lora_adapters.types.base import AdapterConfig


@dataclass
class LierLaConfig(AdapterConfig):
    """LoRA of the linear layers and 1x1 convolutions of attention blocks and CLIP text encoders (kohya's default).

    r is the rank (kohya's network_dim), lora_alpha the alpha. With target_modules given, it acts on any model as
    `LoraConfig` does. rank_pattern and alpha_pattern win over every other rank and alpha. AdapterError for values that
    make no sense.

    As with `LoraConfig`, the model keeps the config that it is given, and fills in what it has decided: target_modules
    and the ranks and alphas of all modules. One config may be used for several models: those after the first get a copy
    of it as it was asked for. Source: LoRA (arXiv:2106.09685), with the coverage of kohya's trainer.

    >>> from diffusers import UNet2DConditionModel
    >>> unet = UNet2DConditionModel(
    ...     block_out_channels=(32, 64),
    ...     down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    ...     up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ...     cross_attention_dim=32,
    ... )
    >>> unet.add_adapter(LierLaConfig(r=8, lora_alpha=4), adapter_name="mine")
    >>> sorted({path.split(".")[0] for path in unet.peft_config["mine"].target_modules})
    ['down_blocks', 'mid_block', 'up_blocks']
    """


class LierLaType(AdapterType):
    """Plain LoRA in kohya's default coverage."""

    name, title, config = "LierLa", "LoRA-LierLa", LierLaConfig
    network_modules = ("networks.lora", "network.lora", "lora", "lierla", "networks.lora_flux", "networks.lora_sd3")
    with_conv = "C3Lier"


TYPE = LierLaType()
