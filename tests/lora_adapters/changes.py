"""Random changes of a linear layer with 64 inputs and 128 outputs, of several kinds, as files have their tensors."""

import torch


def _numbers(*shape: int) -> torch.Tensor:
    return 0.2 * torch.randn(shape)


def _named(names: tuple[str, ...], *shapes: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {name: _numbers(*shape) for name, shape in zip(names, shapes, strict=True)}


_LORA = ("lora_down.weight", "lora_up.weight")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
KINDS = {
    "LoRA": lambda: _named(_LORA, (4, 64), (128, 4)),
    "LoHa": lambda: _named(_LOHA, (128, 2), (2, 64), (128, 2), (2, 64)),
    "LoKr": lambda: {"lokr_w1": _numbers(4, 4), "lokr_w2": _numbers(32, 16)},
    "full": lambda: {"diff": _numbers(128, 64), "diff_b": _numbers(128)},
    "DoRA": lambda: {**KINDS["LoRA"](), "dora_scale": 1 + _numbers(128, 1).abs()},
    "IA3": lambda: {"weight": _numbers(128), "on_input": torch.tensor(0)},
    "OFT": lambda: {"oft_blocks": _numbers(32, 4, 4)},
    "GLoRA": lambda: _named(_GLORA, (64, 4), (4, 64), (128, 4), (4, 64)),
}
