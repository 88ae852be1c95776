"""The options of the image program, under the names of kohya's gen_img."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_adapters.train.generation.refused import RefusedOptions
from lora_adapters.train.options.model import AttentionOptions, ModelSource
from lora_adapters.train.options.option import option
from lora_adapters.train.options.parser import Parser
from lora_adapters.train.options.settings import Given, made
from lora_adapters.train.options.unsupported import refuse
from lora_adapters.train.samplers import SAMPLERS

_COUNT: dict[str, Any] = {"at_least": 1, "range_error": "give 1 or more"}
MAX_SEED = 2**32 - 1


@dataclass
class BaseOptions(ModelSource, AttentionOptions):
    """The model and how it computes."""

    title: ClassVar[str] = "model"
    draws: ClassVar[bool] = True
    pretrained_model_name_or_path: str | None = option(
        None, "checkpoint file, Diffusers folder or hub id", flag="--ckpt"
    )
    lowram: bool = False  # no option here
    v1: bool = option(False, "the model must be SD1.x (it is recognised without this)")
    sdxl: bool = option(False, "the model must be SDXL (it is recognised without this)")
    zero_terminal_snr: bool = option(False, "betas that end in pure noise")
    no_half_vae: bool = option(False, "the VAE computes in fp32 (an SDXL VAE that asks for it does so in any case)")
    fp16: bool = option(False, "compute in fp16")
    bf16: bool = option(False, "compute in bf16")
    diffusers_xformers: bool = option(False, "the same as --xformers")
    opt_channels_last: bool = option(False, "weights of the U-Net and the VAE in channels-last order")
    offload: str | None = option(
        None,
        "models wait in main memory until they compute: each model (slower), or each layer (far slower)",
        unset="all are on the device",
        choices=["model", "sequential"],
    )
    device: str | None = option(None, "cuda, cuda:1, mps, cpu", unset="the first of these that there is")


@dataclass
class PromptOptions:
    """What to draw."""

    title: ClassVar[str] = "what to draw"
    prompt: str | None = option(None, "prompt, with options behind it: a cat --n blurry --w 512 --h 768 --d 1,2")
    from_file: str | None = option(None, "file of prompts, one a line; blank lines and lines with # are left out")
    images_per_prompt: int = option(1, "images for each prompt", **_COUNT)
    n_iter: int = option(1, "number of passes over all prompts", **_COUNT)
    shuffle_prompts: bool = option(False, "in another order each time")
    seed: int | None = option(
        None,
        "seed of the images' seeds; of the image itself where there is but one",
        unset="drawn",
        at_least=0,
        at_most=MAX_SEED,
        range_error=f"seeds are 0 to {MAX_SEED}",
    )
    iter_same_seed: bool = option(False, "the same seed for all prompts; a prompt's further images count on from it")
    image_path: str | None = option(None, "image or folder of images to start from; without prompts, theirs are taken")
    strength: float | None = option(None, "how much of such an image is changed, above 0, up to 1", unset="0.8")


@dataclass
class SamplingOptions:
    """How to draw it."""

    title: ClassVar[str] = "how to draw it"
    W: int | None = option(None, "width in pixels", unset="the size that the model was trained at")
    H: int | None = option(None, "height in pixels", unset="the size that the model was trained at")
    steps: int = option(50, "sampling steps")
    scale: float | None = option(None, "guidance scale", unset="7.5; Flux.1: 3.5; Chroma and others: their pipeline's")
    sampler: str = option("ddim", "sampler (transformers have one of their own)", choices=list(SAMPLERS))
    force_scheduler_zero_steps_offset: bool = option(False, "the sampler's steps_offset is 0")
    batch_size: int = option(1, "images at a time", **_COUNT)
    vae_batch_size: float | None = option(
        None,
        "images at a time in the VAE; below 1, a part of --batch_size",
        unset="--batch_size",
        above=0,
        range_error="give more than 0",
    )
    clip_skip: int | None = option(
        None, "take the text encoder's n-th layer from the end", unset="the last one; SDXL: always 2", **_COUNT
    )
    max_embeddings_multiples: int | None = option(
        None, "longest prompt, in windows of 75 tokens", unset="no limit", **_COUNT
    )
    emb_normalize_mode: str = option(
        "original",
        "what words' weights leave as it was: the mean of the text's embedding, the mean of its absolute values, or "
        "nothing",
        choices=["original", "abs", "none"],
    )
    original_height: int | None = option(
        None, "SDXL: height of the image that it was cut from", unset="the height drawn"
    )
    original_width: int | None = option(None, "SDXL: width of the image that it was cut from", unset="the width drawn")
    negative_original_height: int | None = option(
        None,
        "SDXL: the same height for the negative prompt",
        unset="--original_height",
        flag="--original_height_negative",
    )
    negative_original_width: int | None = option(
        None,
        "SDXL: the same width for the negative prompt",
        unset="--original_width",
        flag="--original_width_negative",
    )
    crop_top: int | None = option(None, "SDXL: pixels cut off at the top", unset="0")
    crop_left: int | None = option(None, "SDXL: pixels cut off at the left", unset="0")


@dataclass
class AdapterOptions:
    """Adapters."""

    title: ClassVar[str] = "adapters"
    network_module: list[str] | None = option(
        None, "networks.lora, networks.dylora; one for each file, or one for all", unset="what each file says"
    )
    network_weights: list[str] | None = option(None, "adapter files, folders or hub ids; FILE:0.8:lbw=MIDD too")
    network_mul: list[float] | None = option(None, "their weights", unset="1 each")
    network_args: list[str] | None = option(None, "for each DyLoRA: rank=, unit=, rank_scaling=", metavar="K=V;K=V")
    network_merge: bool = option(False, "add all adapters to the model's weights")
    network_merge_n_models: int | None = option(None, "add the first n to the model's weights")
    network_pre_calc: bool = option(
        False, "add adapters to the weights for each batch, from a copy of these: fastest, exact"
    )
    network_show_meta: bool = option(False, "print the files' metadata")
    rank: int | None = option(None, "rank that DyLoRA adapters work at", unset="the full one")


@dataclass
class FileOptions:
    """Files that are written."""

    title: ClassVar[str] = "files"
    outdir: str = option("outputs", "folder of the images")
    sequential_file_name: bool = option(False, "im_000001.png, im_000002.png, ...; without it, time, number and seed")
    use_original_file_name: bool = option(False, "with --image_path: the name of that image")


@dataclass
class SheetOptions:
    """A sheet of settings."""

    title: ClassVar[str] = "a sheet of settings"
    sweep: list[str] | None = option(
        None,
        "draw one sheet instead of images, with a row for each prompt and a column for each setting: weight=0,0.5,1 "
        "rank=4,8 steps= scale= sampler=",
        metavar="NAME=V,V,...",
        at_least_one=True,
    )
    sheet: str | None = option(None, "its file", unset="sweep_<time>.png in --outdir")
    sheet_font: str | None = option(None, "TrueType font for its labels", unset="the built-in one, which is Latin only")


@dataclass
class GenerateSettings(
    BaseOptions, PromptOptions, SamplingOptions, AdapterOptions, FileOptions, SheetOptions, RefusedOptions, Given
):
    """The image program's options: an attribute each."""


def parser(defaults: bool = True) -> Parser:
    """A parser of all options; without `defaults` its result has only what is on the command line."""
    new = Parser(
        prog="gen_img_diffusers.py",
        description="Draw images with a base model and adapters, with the options of kohya's gen_img.",
        examples=[
            '--ckpt MODEL --network_weights a.safetensors --network_mul 0.8 --prompt "a cat --n blurry"',
            "--ckpt MODEL --network_weights dylora.safetensors --from_file prompts.txt --sweep weight=0,0.5,1 rank=4,8",
        ],
    )
    new.add_options(GenerateSettings, defaults)
    return new


def parse(argv: Sequence[str] | None = None) -> GenerateSettings:
    """Options from `argv`, then the defaults. Raises OptionError for the first unsupported option that is given."""
    settings = made(GenerateSettings, vars(parser(defaults=False).parse_args(argv)))
    refuse(settings)
    return settings
