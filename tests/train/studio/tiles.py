"""A DyLoRA for examples/tiny-sd with the quickstart's options and random weights."""

from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]


def dylora_file(file: Path) -> Path:
    from diffusers import UNet2DConditionModel

    from lora_adapters import Adapter, DyLoraConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(ROOT / "examples" / "tiny-sd" / "unet")
    unet.add_adapter(DyLoraConfig(r=16, lora_alpha=16, conv_dim=16, conv_alpha=16, unit=4), adapter_name="tiles")
    facts = {"ss_tag_frequency": '{"1_tiles": {"blue tile": 20, "cat": 4}}'}
    adapter = Adapter.from_models({"unet": unet}, "tiles", facts)
    return adapter.map(lambda one: type(one)(one.down, torch.randn_like(one.up) / 50, one.alpha)).save(file)
