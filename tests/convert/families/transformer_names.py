"""Layers of diffusion transformers by their original names, with their counterparts in diffusers, written by hand.

H is the width of the toy models. Each entry is (rows, columns, {path in diffusers: its rows in order}).
"""

import torch

H = 8
QKV = [slice(0, H), slice(H, 2 * H), slice(2 * H, 3 * H)]


def _qkv(prefix: str, *names: str) -> tuple[int, int, dict[str, list[slice]]]:
    return 3 * H, H, {f"{prefix}.{name}": [rows] for name, rows in zip(names, QKV, strict=True)}


def _plain(path: str, rows: int = H, columns: int = H) -> tuple[int, int, dict[str, list[slice]]]:
    return rows, columns, {path: [slice(0, rows)]}


def _swapped(path: str) -> tuple[int, int, dict[str, list[slice]]]:
    return 2 * H, H, {path: [slice(H, 2 * H), slice(0, H)]}


_DOUBLE = {
    "double_blocks.1.img_attn.qkv": _qkv("transformer_blocks.1.attn", "to_q", "to_k", "to_v"),
    "double_blocks.11.txt_attn.qkv": _qkv("transformer_blocks.11.attn", "add_q_proj", "add_k_proj", "add_v_proj"),
    "double_blocks.0.img_attn.proj": _plain("transformer_blocks.0.attn.to_out.0"),
    "double_blocks.0.txt_attn.proj": _plain("transformer_blocks.0.attn.to_add_out"),
}
_LINEAR1 = (
    7 * H,
    H,
    {
        **{f"single_transformer_blocks.20.attn.to_{n}": [rows] for n, rows in zip("qkv", QKV, strict=True)},
        "single_transformer_blocks.20.proj_mlp": [slice(3 * H, 7 * H)],
    },
)
_SINGLE = {
    "single_blocks.20.linear1": _LINEAR1,
    "single_blocks.0.linear2": _plain("single_transformer_blocks.0.proj_out", H, 5 * H),
}
_MLP = {
    "double_blocks.0.img_mlp.0": _plain("transformer_blocks.0.ff.net.0.proj", 4 * H),
    "double_blocks.0.txt_mlp.2": _plain("transformer_blocks.0.ff_context.net.2", H, 4 * H),
}
LAYERS = {
    "flux": {
        **_DOUBLE,
        **_SINGLE,
        **_MLP,
        "double_blocks.0.img_mod.lin": _plain("transformer_blocks.0.norm1.linear", 6 * H),
        "double_blocks.0.txt_mod.lin": _plain("transformer_blocks.0.norm1_context.linear", 6 * H),
        "single_blocks.0.modulation.lin": _plain("single_transformer_blocks.0.norm.linear", 3 * H),
        "img_in": _plain("x_embedder", H, 4),
        "vector_in.out_layer": _plain("time_text_embed.text_embedder.linear_2"),
        "final_layer.linear": _plain("proj_out", 4),
        "final_layer.adaLN_modulation.1": _swapped("norm_out.linear"),
    },
    "chroma": {
        **_DOUBLE,
        **_SINGLE,
        **_MLP,
        "distilled_guidance_layer.layers.3.in_layer": _plain("distilled_guidance_layer.layers.3.linear_1"),
    },
    "sd3": {
        "joint_blocks.2.x_block.attn.qkv": _qkv("transformer_blocks.2.attn", "to_q", "to_k", "to_v"),
        "joint_blocks.0.x_block.attn2.qkv": _qkv("transformer_blocks.0.attn2", "to_q", "to_k", "to_v"),
        "joint_blocks.0.context_block.attn.qkv": _qkv(
            "transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj"
        ),
        "joint_blocks.0.x_block.attn2.proj": _plain("transformer_blocks.0.attn2.to_out.0"),
        "joint_blocks.0.context_block.mlp.fc1": _plain("transformer_blocks.0.ff_context.net.0.proj", 4 * H),
        "joint_blocks.0.x_block.adaLN_modulation.1": _plain("transformer_blocks.0.norm1.linear", 9 * H),
        "joint_blocks.0.context_block.adaLN_modulation.1": _plain("transformer_blocks.0.norm1_context.linear", 6 * H),
        "joint_blocks.2.context_block.adaLN_modulation.1": _swapped("transformer_blocks.2.norm1_context.linear"),
        "t_embedder.mlp.0": _plain("time_text_embed.timestep_embedder.linear_1", H, 4),
        "final_layer.adaLN_modulation.1": _swapped("norm_out.linear"),
    },
    "flux2": {
        **_DOUBLE,
        "single_blocks.20.linear1": _plain("single_transformer_blocks.20.attn.to_qkv_mlp_proj", 9 * H),
        "single_blocks.0.linear2": _plain("single_transformer_blocks.0.attn.to_out", H, 4 * H),
        "double_blocks.0.img_mlp.0": _plain("transformer_blocks.0.ff.linear_in", 6 * H),
        "double_blocks.0.txt_mlp.2": _plain("transformer_blocks.0.ff_context.linear_out", H, 3 * H),
        "double_stream_modulation_img.lin": _plain("double_stream_modulation_img.linear", 6 * H),
        "guidance_in.in_layer": _plain("time_guidance_embed.guidance_embedder.linear_1", H, 4),
        "final_layer.adaLN_modulation.1": _swapped("norm_out.linear"),
    },
    "lumina2": {
        "layers.12.attention.qkv": (
            2 * H,
            H,
            {
                "layers.12.attn.to_q": [slice(0, H)],
                "layers.12.attn.to_k": [slice(H, H + H // 2)],
                "layers.12.attn.to_v": [slice(H + H // 2, 2 * H)],
            },
        ),
        "context_refiner.1.attention.out": _plain("context_refiner.1.attn.to_out.0"),
        "noise_refiner.0.feed_forward.w2": _plain("noise_refiner.0.feed_forward.linear_2", H, 3 * H),
        "layers.0.adaLN_modulation.1": _plain("layers.0.norm1.linear", 4 * H),
        "cap_embedder.1": _plain("time_caption_embed.caption_embedder.1", H, 4),
        "final_layer.adaLN_modulation.1": _plain("norm_out.linear_1"),
        "final_layer.linear": _plain("norm_out.linear_2", 4),
    },
    "zimage": {
        "layers.12.attention.qkv": _qkv("layers.12.attention", "to_q", "to_k", "to_v"),
        "context_refiner.1.attention.out": _plain("context_refiner.1.attention.to_out.0"),
        "noise_refiner.0.feed_forward.w2": _plain("noise_refiner.0.feed_forward.w2", H, 3 * H),
        "layers.0.adaLN_modulation.0": _plain("layers.0.adaLN_modulation.0", 4 * H),
        "final_layer.linear": _plain("all_final_layer.2-1.linear", 4),
    },
    "qwen_image": {
        path: _plain(path)
        for path in (
            *("transformer_blocks.9.attn.to_q", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.img_mod.1"),
            *("transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.txt_mlp.net.2", "img_in", "proj_out"),
        )
    },
}
FUSES = [name for name in LAYERS if name != "qwen_image"]


def pairs(family: str, rank: int = 3, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Original layer name -> random (down, up, alpha) for each layer of a family; ranks differ."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for number, (name, (rows, columns, _)) in enumerate(LAYERS[family].items()):
        own = rank + number % 3
        down, up = torch.randn(own, columns, generator=draw), torch.randn(rows, own, generator=draw)
        made[name] = (down, up, float(1 + number % 4))
    return made


def deltas(family: str, made: dict) -> dict[str, torch.Tensor]:
    """Path in diffusers -> delta of the weight."""
    found = {}
    for name, (down, up, alpha) in made.items():
        whole = (up.double() @ down.double()) * (alpha / len(down))
        for path, rows in LAYERS[family][name][2].items():
            found[path] = torch.cat([whole[span] for span in rows]).float()
    return found
