"""Options: the base model, the machine, and the network."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora_adapters.train.options.option import Inert, option

_DEEPSPEED = "DeepSpeed is not supported: an adapter's optimizer is small; use several devices through accelerate"
_BACKENDS = "no eager aot_eager inductor aot_ts_nvfuser nvprims_nvfuser cudagraphs ofi fx2trt onnxrt tensort ipex tvm"
MAX_SEED = 2**64 - 1
_IN_BASE = "the base model's"
PARTS = ("clip_l", "clip_g", "t5xxl", "ae")  # options that name files of parts of a transformer's model
ZERO = Inert(lambda value, _: value == 0, "0 is taken as not given")


def _without_deepspeed(settings: Any) -> bool:
    return not settings.deepspeed


def _deepspeed(default: Any, help: str, **facts: Any) -> Any:
    """An option of DeepSpeed's, which nothing reads without --deepspeed."""
    case = Inert(lambda _, settings: _without_deepspeed(settings), "it has no effect without --deepspeed")
    return option(
        default, f"DeepSpeed: {help}", unread=_without_deepspeed, inert=(case,), goes_with="deepspeed", **facts
    )


@dataclass
class ModelSource:
    """Where the parts of a base model are, and how they are read: for training and for drawing."""

    draws: ClassVar[bool] = False  # whether models that are not trained are of use, too
    pretrained_model_name_or_path: str | None = option(None, "base model: checkpoint file, Diffusers folder or hub id")
    model_config: str | None = option(
        None, "Diffusers folder or hub id with the configs and tokenizer for a checkpoint file"
    )
    v2: bool = option(False, "the model is SD2.x; with this, --v_parameterization alone tells what it predicts")
    v_parameterization: bool = option(False, "the model predicts v (SD2.x 768)")
    vae: str | None = option(None, "another VAE: file, Diffusers folder or hub id", unset="the base model's")
    clip_l: str | None = option(None, "Flux.1, SD3: file of CLIP-L", unset=_IN_BASE)
    clip_g: str | None = option(None, "SD3: file of CLIP-G", unset=_IN_BASE)
    t5xxl: str | None = option(None, "Flux.1, SD3: file of T5-XXL; SD3 does without", unset=_IN_BASE)
    ae: str | None = option(None, "Flux.1, SD3: file of the VAE", unset=_IN_BASE)
    tokenizer_cache_dir: str | None = option(
        None,
        "folder in which configs and tokenizers from the hub are kept; tokenizers as kohya's trainers keep them, too",
        unset="the Hub's cache",
    )
    disable_mmap_load_safetensors: bool = option(False, "read safetensors files whole instead of mapping them")
    lowram: bool = option(False, "load the base model straight to the training device", metadata=True)


@dataclass
class AttentionOptions:
    """How attention is computed: for training and for drawing."""

    xformers: bool = option(False, "attention by xformers (CUDA)")
    sdpa: bool = option(False, "attention by PyTorch's scaled_dot_product_attention (what is used anyway)")


@dataclass
class BaseModelOptions(ModelSource):
    """The base model."""

    title: ClassVar[str] = "base model"
    highvram: bool = option(False, "keep the VAE and frozen text encoders on the training device after caching")


@dataclass
class MachineOptions(AttentionOptions):
    """Precision, memory, devices."""

    title: ClassVar[str] = "machine"
    mem_eff_attn: bool = option(False, "attention in slices: slower, less memory")
    mixed_precision: str = option("no", "precision of the forward pass", choices=["no", "fp16", "bf16"], metadata=True)
    full_fp16: bool = option(
        False, "accepted; adapter and gradients stay in fp32; needs --mixed_precision fp16", metadata=True
    )
    full_bf16: bool = option(False, "adapter and gradients in bf16; needs --mixed_precision bf16", metadata=True)
    fp8_base: bool = option(
        False,
        "the denoiser's linear layers keep their weights in float8 (e4m3); goes with --gradient_checkpointing",
        metadata=True,
    )
    fp8_base_unet: bool = option(False, "the same as --fp8_base: text encoders stay as they are", metadata=True)
    quantize_base: str | None = option(
        None,
        "the denoiser's linear layers keep their weights in 4 bits (nf4) or 8 (int8), by bitsandbytes",
        unset="as they are",
        choices=["nf4", "int8"],
        metadata=True,
    )
    no_half_vae: bool = option(False, "the VAE stays in fp32 under mixed precision")
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass: slower, far less memory", metadata=True
    )
    cpu_offload_checkpointing: bool = option(False, "keep activations in main memory until the backward pass")
    torch_compile: bool = option(False, "compile the models")
    dynamo_backend: str = option(
        "inductor",
        "compiler for --torch_compile; no: none",
        choices=_BACKENDS.split(),
        unread=lambda settings: not settings.torch_compile,
    )
    seed: int | None = option(
        None,
        "seed of everything random",
        unset="drawn",
        metadata=True,
        at_least=0,
        at_most=MAX_SEED,
        range_error=f"seeds are 0 to {MAX_SEED}; one is drawn without --seed",
    )
    clip_skip: int | None = option(
        None, "take the text encoder's n-th layer from the end", unset="the last one; SDXL: 2", metadata=True,
        at_least=1, inert=(ZERO,),
    )  # fmt: skip
    max_token_length: int | None = option(None, "tokens a caption", unset="75", choices=[75, 150, 225], metadata=True)
    ddp_timeout: int | None = option(None, "minutes that processes wait for each other", unset="PyTorch's")
    ddp_gradient_as_bucket_view: bool = option(False, "DistributedDataParallel's gradient_as_bucket_view")
    ddp_static_graph: bool = option(False, "DistributedDataParallel's static_graph")
    deepspeed: bool = option(False, "train with DeepSpeed", unsupported=_DEEPSPEED)
    zero_stage: int = _deepspeed(2, "ZeRO stage", choices=[0, 1, 2, 3])
    offload_optimizer_device: str | None = _deepspeed(None, "where the optimizer is", choices=["cpu", "nvme"])
    offload_optimizer_nvme_path: str | None = _deepspeed(None, "folder for the optimizer")
    offload_param_device: str | None = _deepspeed(None, "where the weights are", choices=["cpu", "nvme"])
    offload_param_nvme_path: str | None = _deepspeed(None, "folder for the weights")
    zero3_init_flag: bool = _deepspeed(False, "zero.Init in stage 3")
    zero3_save_16bit_model: bool = _deepspeed(False, "save in 16 bits in stage 3")
    fp16_master_weights_and_gradients: bool = _deepspeed(False, "optimizer in fp16")


@dataclass
class NetworkOptions:
    """The adapter."""

    title: ClassVar[str] = "network"
    network_module: str | None = option(None, "networks.lora, dylora, loha or lokr; lycoris.kohya; c3lier")
    network_dim: int | None = option(None, "rank", unset="4")
    network_alpha: float = option(1, "alpha: the adapter is scaled by alpha/rank")
    network_dropout: float | None = option(None, "dropout on the low-rank activations", metadata=True)
    network_args: list[str] | dict[str, Any] | None = option(
        None, "conv_dim=4 conv_alpha=1 unit=4 block_dims=... preset=... ...", metavar="KEY=VALUE"
    )
    network_weights: str | None = option(None, "adapter file whose weights training starts from")
    dim_from_weights: bool = option(False, "take ranks and alphas from --network_weights")
    network_train_unet_only: bool = option(False, "no adapter on the text encoder")
    network_train_text_encoder_only: bool = option(False, "no adapter on the U-Net")
    scale_weight_norms: float | None = option(None, "largest norm of a module's delta", metadata=True)
    base_weights: list[str] | None = option(None, "adapter files merged into the base model before training")
    base_weights_multiplier: list[float] | None = option(None, "their weights", unset="1 each")


@dataclass
class ModelOptions(BaseModelOptions, MachineOptions, NetworkOptions):
    """What is trained, and on what."""
