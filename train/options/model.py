"""Command-line options: the base model, the machine, and the network."""

import argparse

from lora_adapters.convert.parsing import number
from lora_adapters.train.options.parser import add_attention, add_model_source, adders


def add_model(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--pretrained_model_name_or_path", help="base model: checkpoint file, Diffusers folder or hub id")
    add_model_source(group)
    flag("--lowram", help="load the base model straight to the training device")
    flag("--highvram", help="keep the VAE and frozen text encoders on the training device after caching")


def add_machine(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    add_attention(group)
    flag("--mem_eff_attn", help="attention in slices: slower, less memory")
    option("--mixed_precision", default="no", choices=["no", "fp16", "bf16"], help="precision of the forward pass")
    flag("--full_fp16", help="accepted; adapter and gradients stay in fp32; needs --mixed_precision fp16")
    flag("--full_bf16", help="adapter and gradients in bf16; needs --mixed_precision bf16")
    flag("--fp8_base", help="frozen weights in float8")
    flag("--fp8_base_unet", help="frozen U-Net weights in float8")
    flag("--no_half_vae", help="the VAE stays in fp32 under mixed precision")
    flag("--gradient_checkpointing", help="compute activations again in the backward pass: slower, far less memory")
    flag("--cpu_offload_checkpointing", help="keep activations in main memory until the backward pass")
    flag("--torch_compile", help="compile the models")
    backends = (
        "no eager aot_eager inductor aot_ts_nvfuser nvprims_nvfuser cudagraphs ofi fx2trt onnxrt tensort ipex tvm"
    )
    option(
        "--dynamo_backend", default="inductor", choices=backends.split(), help="compiler for --torch_compile; no: none"
    )
    option("--seed", type=int, help="seed of everything random (default: drawn)")
    option("--clip_skip", type=int, help="take the text encoder's n-th layer from the end")
    option("--max_token_length", type=int, choices=[None, 75, 150, 225], help="tokens a caption (default 75)")
    option("--ddp_timeout", type=int, help="minutes that processes wait for each other")
    flag("--ddp_gradient_as_bucket_view", help="DistributedDataParallel's gradient_as_bucket_view")
    flag("--ddp_static_graph", help="DistributedDataParallel's static_graph")
    flag("--deepspeed", help="DeepSpeed")
    option("--zero_stage", type=int, default=2, choices=[0, 1, 2, 3], help="DeepSpeed: ZeRO stage")
    option("--offload_optimizer_device", choices=[None, "cpu", "nvme"], help="DeepSpeed")
    option("--offload_optimizer_nvme_path", help="DeepSpeed")
    option("--offload_param_device", choices=[None, "cpu", "nvme"], help="DeepSpeed")
    option("--offload_param_nvme_path", help="DeepSpeed")
    flag("--zero3_init_flag", help="DeepSpeed")
    flag("--zero3_save_16bit_model", help="DeepSpeed")
    flag("--fp16_master_weights_and_gradients", help="DeepSpeed")


def add_network(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--network_module", help="networks.lora or networks.dylora; lierla, c3lier, dylora")
    option("--network_dim", type=int, help="rank (default 4)")
    option("--network_alpha", type=number, default=1, help="alpha: the adapter is scaled by alpha/rank")
    option("--network_dropout", type=number, help="dropout on the low-rank activations")
    option("--network_args", nargs="*", metavar="KEY=VALUE", help="conv_dim=4 conv_alpha=1 unit=4 block_dims=... ...")
    option("--network_weights", help="adapter file whose weights training starts from")
    flag("--dim_from_weights", help="take ranks and alphas from --network_weights")
    flag("--network_train_unet_only", help="no adapter on the text encoder")
    flag("--network_train_text_encoder_only", help="no adapter on the U-Net")
    option("--scale_weight_norms", type=number, help="largest norm of a module's delta")
    option("--base_weights", nargs="*", help="adapter files merged into the base model before training")
    option("--base_weights_multiplier", type=number, nargs="*", help="their weights (default 1 each)")
