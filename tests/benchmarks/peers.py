"""Layers of other projects on a U-Net, for comparison."""

import logging
from typing import Any


def lycoris_network(unet: Any, rank: int, **options: Any) -> Any:
    """Add LyCORIS' layers to the modules of LoRA-LierLa; `network_module` is their kind, and alpha is the rank."""
    from lycoris.wrapper import LycorisNetwork

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    preset = {"enable_conv": False, "target_module": ["Transformer2DModel"], "lora_prefix": "lora_unet"}
    LycorisNetwork.apply_preset(preset)
    network = LycorisNetwork(unet, lora_dim=rank, conv_lora_dim=0, alpha=rank, warn_on_unmatched=False, **options)
    network.apply_to()
    unet.lycoris = network  # keeps the network alive
    return network
