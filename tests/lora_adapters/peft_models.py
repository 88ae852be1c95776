"""One model of each sort that PEFT's users put adapters on, with an input."""

import torch
from torch import nn

from lora_adapters import C3LierConfig, DyLoraConfig, LierLaConfig

from .conftest import expected, make_pipeline


class Custom(nn.Module):
    """A model of linear layers and convolutions, without Stable Diffusion's blocks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.point = nn.Conv2d(16, 64, 1)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False))
        self.head = nn.Linear(64, 64)

    def forward(self, x):
        return self.head(self.body(self.point(self.conv(x)).mean((2, 3))))


def custom():
    torch.manual_seed(0)
    model, x = Custom(), torch.randn(3, 3, 9, 9)
    return model, lambda model: model(x)


def unet():
    golden = expected("sd15")
    given = golden["latents"], 7, golden["context"]
    return make_pipeline().unet, lambda model: model(*given).sample


def clip():
    ids = expected("sd15")["input_ids"]
    return make_pipeline().text_encoder, lambda model: model(ids)[0]


MODELS = {"unet": unet, "clip": clip, "custom": custom}
CONFIGS = {
    "lierla": (LierLaConfig, {}),
    "c3lier": (C3LierConfig, {"conv_dim": 2, "conv_alpha": 3}),
    "dylora": (DyLoraConfig, {"conv_dim": 2, "conv_alpha": 3, "unit": 2}),
}
TARGETS = ["conv", "point", "body.0", "body.2"]


def config(kind, model, **options):
    """A config of that kind, with target_modules for the custom model."""
    cls, own = CONFIGS[kind]
    if model == "custom":
        options["target_modules"] = TARGETS
    return cls(**{"r": 4, "lora_alpha": 2, **own, **options})


def fill(model, adapter_name="default", seed=1):
    """Fill the adapter's `up` matrices, which are initialised with zeros, with random numbers."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter_name}." in name:
                parameter.normal_(std=0.1)
    return model


def changed_by_hand(base, peft_model, weights):
    """The base model with Σ weight · alpha/rank · up · down added to its weights, by the layers' own r and alpha."""
    with torch.no_grad():
        for path, layer in peft_model.named_modules():
            if not hasattr(layer, "lora_A") or not hasattr(layer, "base_layer"):
                continue
            path = path.removeprefix("base_model.model.")
            weight = base.get_submodule(path).weight
            for name, factor in weights.items():
                if name in layer.lora_A:
                    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                    delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
                    weight += factor * layer.lora_alpha[name] / layer.r[name] * delta
    return base
