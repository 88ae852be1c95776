"""LoRA-LierLa: kohya's default."""

from dataclasses import dataclass

from lora_adapters.types.adapter_type import AdapterType
from lora_adapters.types.base import AdapterConfig


@dataclass
class LierLaConfig(AdapterConfig):
    """LoRA of the linear layers and 1x1 convolutions of attention blocks and CLIP text encoders (kohya's default).

    r is the rank (kohya's network_dim) and lora_alpha the alpha. If target_modules is given, the config works for any
    model, like `LoraConfig`. rank_pattern and alpha_pattern take precedence over all other ranks and alphas. Invalid
    values raise AdapterError.

    As with `LoraConfig`, the model keeps the config that it is given and fills in target_modules and the ranks and
    alphas of all modules. One config can be used for several models: each model after the first gets a copy of the
    original config. Source: LoRA (arXiv:2106.09685), with the target modules of kohya's trainer.

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
    """Plain LoRA of kohya's default target modules."""

    name, title, config = "LierLa", "LoRA-LierLa", LierLaConfig
    network_modules = ("networks.lora", "network.lora", "lora", "lierla", "networks.lora_flux", "networks.lora_sd3")
    with_conv = "C3Lier"


TYPE = LierLaType()
