"""Full-size checkpoints and adapters of SD1.5, SDXL and Flux.1 with random weights, for benchmarks.

Checkpoints are complete and have the original code's names, so that every program can open them. Names and shapes come
from diffusers' and transformers' models, which are created without weights; adapted modules are listed in tests/golden.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from lora_adapters.convert import Adapter, LowRank, ModuleName
from lora_adapters.convert.deltas import Delta, DoRA, Full, Hadamard, Kronecker, Norm
from lora_adapters.convert.deltas.nearest_kronecker import split
from lora_adapters.convert.families.checkpoint_names import slices_in_file
from lora_adapters.convert.families.registry import by_name
from lora_adapters.convert.storage.weights_writing import Planned, stream
from tests.benchmarks import flux_size
from tests.convert.checkpoints import open_clip, original_unet_name
from tests.train.single_files import vae_name

MODULES = Path(__file__).resolve().parent.parent / "golden" / "modules"
SIZES = ("sd15", "sdxl", "flux")
_SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def _text(projection_dim: int = 768, **options: int) -> dict[str, torch.Tensor]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = CLIPTextConfig(vocab_size=49408, projection_dim=projection_dim, **{**sizes, **options})
    return CLIPTextModelWithProjection(config).state_dict()


def _big_g(prefix: str) -> dict[str, torch.Tensor]:
    text = _text(1280, **_BIG_G)
    made = open_clip(text, f"{prefix}transformer.")
    made[f"{prefix}token_embedding.weight"] = text["text_model.embeddings.token_embedding.weight"]
    made[f"{prefix}positional_embedding"] = text["text_model.embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        made[f"{prefix}ln_final.{kind}"] = text[f"text_model.final_layer_norm.{kind}"]
    made[f"{prefix}text_projection"] = text["text_projection.weight"]
    made[f"{prefix}logit_scale"] = torch.empty(())
    return made


def unet(size: str) -> torch.nn.Module:
    """The U-Net of SD1.5 or SDXL, on the default device."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**(_SDXL_UNET if size == "sdxl" else {"cross_attention_dim": 768}))


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a checkpoint file."""
    if size == "flux":
        return flux_size.shapes()
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        weights = unet(size).state_dict()
        made = {f"model.diffusion_model.{original_unet_name(n, size)}": w for n, w in weights.items()}
        for name, weight in AutoencoderKL(**_VAE).state_dict().items():
            name = vae_name(name)
            square = "attn_1" in name and weight.ndim == 2
            made[f"first_stage_model.{name}"] = weight[:, :, None, None] if square else weight
        clip = "conditioner.embedders.0.transformer." if size == "sdxl" else "cond_stage_model.transformer."
        made |= {f"{clip}{name}": weight for name, weight in _text().items() if name.startswith("text_model.")}
        if size == "sdxl":
            made |= _big_g("conditioner.embedders.1.model.")
    return {name: tuple(weight.shape) for name, weight in made.items()}


def make_checkpoint(path: Path, size: str, tuned: bool = False, dtype: torch.dtype = torch.float16) -> Path:
    """Create a random checkpoint. `tuned` adds a random difference to every adapted module of the same checkpoint.

    Flux.1's checkpoint consists of zeros in a sparse file.
    """
    if path.exists():
        return path
    table = shapes(size)
    if size == "flux" and not tuned:
        return flux_size.make_zeros(path, table, dtype)
    stand_ins = {name: torch.empty(shape, device="meta") for name, shape in table.items()}
    adapted = {place.key for place in slices_in_file(stand_ins, by_name("sd" if size == "sd15" else size)).values()}
    planned = {
        name: Planned(
            dtype, shape, lambda n=name, s=shape: _weight(n, s, tuned and n in adapted, size == "flux").to(dtype)
        )
        for name, shape in table.items()
    }
    stream(path, planned, {})
    return path


def _weight(name: str, shape: tuple[int, ...], tuned: bool, zeros: bool) -> torch.Tensor:
    """Random numbers or zeros. `tuned` adds a matrix with a decaying spectrum and noise, like fine-tuning."""
    if len(shape) < 2 and not zeros:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weight = torch.zeros(shape) if zeros else torch.randn(shape, generator=generator) * 0.02
    if tuned:
        flat = weight.view(shape[0], -1)
        rank = min(128, *flat.shape)
        left = torch.randn(flat.shape[0], rank, generator=generator) * torch.arange(1, rank + 1) ** -0.7
        flat.addmm_(left, torch.randn(rank, flat.shape[1], generator=generator), alpha=1e-3)
        flat.add_(torch.randn(flat.shape, generator=generator), alpha=5e-4)
    return weight


def modules(size: str) -> Iterator[tuple[ModuleName, tuple[int, ...], bool]]:
    """Every adapted module, the shape of its weight, and whether LierLa adapts it."""
    table = json.loads((MODULES / f"kohya_modules_{size}.json").read_text())
    for row in table["rows"]:
        entry = dict(zip(table["columns"], row, strict=True))
        kernel = {"linear": (), "conv1x1": (1, 1), "conv3x3": (3, 3)}[entry["kind"]]
        module = ModuleName(entry["component"], entry["diffusers_module"])
        yield module, (entry["out"], entry["in"], *kernel), entry["lierla"]


def norms(size: str) -> Iterator[tuple[ModuleName, int]]:
    """Every normalisation layer of the U-Net, and its number of channels."""
    with torch.device("meta"):
        named = dict(unet(size).named_modules())
    for path, module in named.items():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
            yield ModuleName("unet", path), len(module.weight)


def make_lycoris(path: Path, size: str, kind: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Create a random adapter for all modules of LoRA-C3Lier, or for all normalisation layers of the U-Net.

    kind is "loha" (rank 8), "lokr" (both factors full), "dora" (rank 16), "full" (differences in `dtype`) or "norm".
    """
    if path.exists():
        return path
    torch.manual_seed(seed)
    if kind == "norm":
        Adapter({name: Norm(*(torch.randn(2, count) * 0.01)) for name, count in norms(size)}).save(path)
        return path
    made: dict[ModuleName, Delta] = {}
    for module, (out, into, *kernel), _ in modules(size):
        if kind == "loha":
            flat, rank = into * math.prod(kernel), 8
            shapes_of = ((out, rank), (rank, flat)) * 2
            made[module] = Hadamard(*(torch.randn(shape) * 0.1 for shape in shapes_of), alpha=float(rank))
        elif kind == "dora":
            pair = LowRank(torch.randn(16, into, *kernel) * 0.02, torch.randn(out, 16, *[1] * len(kernel)) * 0.01, 16.0)
            made[module] = DoRA(pair, torch.ones(out, 1, *[1] * len(kernel)))
        elif kind == "full":
            made[module] = Full((torch.randn(out, into, *kernel) * 0.001).to(dtype))
        else:
            (a, c), (b, d) = split(out, 8), split(into, 8)
            made[module] = Kronecker(torch.randn(a, b) * 0.1, torch.randn(c, d, *kernel) * 0.1, 1.0)
    Adapter(made).save(path)
    return path


def make_adapter(path: Path, size: str, rank: int, conv_rank: int | None, seed: int, most: int | None = None) -> Path:
    """Create a random LoRA-LierLa, or with conv_rank a LoRA-C3Lier; `most` limits the number of modules."""
    if path.exists():
        return path
    if size == "flux":
        return flux_size.make_adapter(path, rank, seed)
    torch.manual_seed(seed)
    made = {}
    for module, shape, lierla in modules(size):
        if (not lierla and conv_rank is None) or len(made) == most:
            continue
        count = conv_rank if shape[2:] == (3, 3) and conv_rank else rank
        up = torch.randn(shape[0], count, *(1 for _ in shape[2:])) * 0.01
        made[module] = LowRank(torch.randn(count, *shape[1:]) * 0.02, up, float(count))
    Adapter(made).save(path)
    return path
