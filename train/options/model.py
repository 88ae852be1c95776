"""Options: the base model, precision and memory, and the network."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora_adapters.train.options.option import Inert, option

_DEEPSPEED = "DeepSpeed is not supported: an adapter's optimizer is small; use several devices through accelerate"
_BACKENDS = "no eager aot_eager inductor aot_ts_nvfuser nvprims_nvfuser cudagraphs ofi fx2trt onnxrt tensort ipex tvm"
MAX_SEED = 2**64 - 1
_IN_BASE = "the base model's"
PARTS = ("clip_l", "clip_g", "t5xxl", "ae")  # options for files of the parts of a transformer model
ZERO = Inert(lambda value, _: value == 0, "0 is taken as not given")


def _without_deepspeed(settings: Any) -> bool:
    return not settings.deepspeed


def _deepspeed(default: Any, help: str, **facts: Any) -> Any:
    """A DeepSpeed option, which has no effect without --deepspeed."""
    case = Inert(lambda _, settings: _without_deepspeed(settings), "it has no effect without --deepspeed")
    return option(
        default, f"DeepSpeed: {help}", unread=_without_deepspeed, inert=(case,), goes_with="deepspeed", **facts
    )


@dataclass
class ModelSource:
    """Files of the base model and how they are read, for training and image generation."""

    draws: ClassVar[bool] = False  # whether families for image generation only are allowed
    pretrained_model_name_or_path: str | None = option(None, "base model: checkpoint file, Diffusers folder or Hub id")
    model_config: str | None = option(
        None, "Diffusers folder or Hub id with the configs and tokenizers for a checkpoint file"
    )
    v2: bool = option(False, "the model is SD2.x; --v_parameterization then decides what it predicts")
    v_parameterization: bool = option(False, "the model uses v-prediction (SD2.x 768)")
    vae: str | None = option(None, "VAE to use instead: file, Diffusers folder or Hub id", unset="the base model's")
    clip_l: str | None = option(None, "Flux.1, SD3: CLIP-L text encoder file", unset=_IN_BASE)
    clip_g: str | None = option(None, "SD3: CLIP-G text encoder file", unset=_IN_BASE)
    t5xxl: str | None = option(None, "Flux.1, SD3: T5-XXL text encoder file; optional for SD3", unset=_IN_BASE)
    ae: str | None = option(None, "Flux.1, SD3: VAE (autoencoder) file", unset=_IN_BASE)
    tokenizer_cache_dir: str | None = option(
        None,
        "cache folder for configs and tokenizers from the Hub; one that kohya's trainers filled works too",
        unset="the Hub's cache",
    )
    disable_mmap_load_safetensors: bool = option(
        False, "read safetensors files into memory instead of memory-mapping them"
    )
    lowram: bool = option(False, "load the base model directly to the training device", metadata=True)


@dataclass
class AttentionOptions:
    """The attention implementation, for training and image generation."""

    xformers: bool = option(False, "use xformers for attention (CUDA)")
    sdpa: bool = option(False, "use PyTorch's scaled_dot_product_attention (already used without this option)")


@dataclass
class BaseModelOptions(ModelSource):
    """The base model."""

    title: ClassVar[str] = "base model"
    highvram: bool = option(False, "keep the VAE and frozen text encoders on the training device after caching")


@dataclass
class MachineOptions(AttentionOptions):
    """Precision, memory, devices."""

    title: ClassVar[str] = "machine"
    mem_eff_attn: bool = option(False, "compute attention in slices: slower, uses less memory")
    mixed_precision: str = option("no", "precision of the forward pass", choices=["no", "fp16", "bf16"], metadata=True)
    full_fp16: bool = option(
        False, "accepted, but adapter and gradients stay in fp32; requires --mixed_precision fp16", metadata=True
    )
    full_bf16: bool = option(
        False, "keep adapter and gradients in bf16; requires --mixed_precision bf16", metadata=True
    )
    fp8_base: bool = option(
        False,
        "store the linear layers of the U-Net or transformer in fp8 (e4m3); use it with --gradient_checkpointing",
        metadata=True,
    )
    fp8_base_unet: bool = option(False, "the same as --fp8_base, which does not change text encoders", metadata=True)
    quantize_base: str | None = option(
        None,
        "quantise the linear layers of the U-Net or transformer with bitsandbytes, to 4 bits (nf4) or 8 bits (int8)",
        unset="not quantised",
        choices=["nf4", "int8"],
        metadata=True,
    )
    no_half_vae: bool = option(False, "keep the VAE in fp32 under mixed precision")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: slower, uses far less memory", metadata=True
    )
    cpu_offload_checkpointing: bool = option(False, "offload activations to CPU memory until the backward pass")
    torch_compile: bool = option(False, "compile the models with torch.compile")
    dynamo_backend: str = option(
        "inductor",
        "torch.compile backend for --torch_compile; no disables it",
        choices=_BACKENDS.split(),
        unread=lambda settings: not settings.torch_compile,
    )
    seed: int | None = option(
        None,
        "random seed",
        unset="chosen at random",
        metadata=True,
        at_least=0,
        at_most=MAX_SEED,
        range_error=f"seeds are 0 to {MAX_SEED}; one is drawn without --seed",
    )
    clip_skip: int | None = option(
        None, "use the n-th layer from the end of the text encoder", unset="the last layer; SDXL: 2", metadata=True,
        at_least=1, inert=(ZERO,),
    )  # fmt: skip
    max_token_length: int | None = option(
        None, "maximum number of tokens in a caption", unset="75", choices=[75, 150, 225], metadata=True
    )
    ddp_timeout: int | None = option(None, "DDP timeout in minutes", unset="PyTorch's")
    ddp_gradient_as_bucket_view: bool = option(False, "enable gradient_as_bucket_view of DDP")
    ddp_static_graph: bool = option(False, "enable static_graph of DDP")
    deepspeed: bool = option(False, "train with DeepSpeed", unsupported=_DEEPSPEED)
    zero_stage: int = _deepspeed(2, "ZeRO stage", choices=[0, 1, 2, 3])
    offload_optimizer_device: str | None = _deepspeed(
        None, "device to offload the optimizer to", choices=["cpu", "nvme"]
    )
    offload_optimizer_nvme_path: str | None = _deepspeed(None, "NVMe folder to offload the optimizer to")
    offload_param_device: str | None = _deepspeed(None, "device to offload the weights to", choices=["cpu", "nvme"])
    offload_param_nvme_path: str | None = _deepspeed(None, "NVMe folder to offload the weights to")
    zero3_init_flag: bool = _deepspeed(False, "use zero.Init in stage 3")
    zero3_save_16bit_model: bool = _deepspeed(False, "save a 16-bit model in stage 3")
    fp16_master_weights_and_gradients: bool = _deepspeed(False, "keep master weights and gradients in fp16")


@dataclass
class NetworkOptions:
    """The adapter."""

    title: ClassVar[str] = "network"
    network_module: str | None = option(
        None, "networks.lora, networks.dylora, networks.loha, networks.lokr, lycoris.kohya or c3lier"
    )
    network_dim: int | None = option(None, "rank of the adapter", unset="4")
    network_alpha: float = option(1, "alpha; the adapter is scaled by alpha/rank")
    network_dropout: float | None = option(None, "dropout on the low-rank activations", metadata=True)
    network_args: list[str] | dict[str, Any] | None = option(
        None,
        "further options of the adapter, such as conv_dim=4 conv_alpha=1 unit=4 block_dims=... preset=...",
        metavar="KEY=VALUE",
    )
    network_weights: str | None = option(None, "adapter file to start training from")
    dim_from_weights: bool = option(False, "take ranks and alphas from --network_weights")
    network_train_unet_only: bool = option(False, "train no adapter for the text encoders")
    network_train_text_encoder_only: bool = option(False, "train no adapter for the U-Net or transformer")
    scale_weight_norms: float | None = option(
        None, "maximum norm of a module's weight change; larger changes are scaled down", metadata=True
    )
    base_weights: list[str] | None = option(None, "adapter files to merge into the base model before training")
    base_weights_multiplier: list[float] | None = option(None, "weight of each of --base_weights", unset="1")


@dataclass
class ModelOptions(BaseModelOptions, MachineOptions, NetworkOptions):
    """All options for models."""
