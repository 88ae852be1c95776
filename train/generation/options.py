"""The options of the image generation program, with the names of kohya's gen_img."""

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
        None, "base model: checkpoint file, Diffusers folder or Hub id", flag="--ckpt"
    )
    lowram: bool = False  # no option here
    v1: bool = option(False, "require an SD1.x model (the version is detected automatically)")
    sdxl: bool = option(False, "require an SDXL model (the version is detected automatically)")
    zero_terminal_snr: bool = option(False, "rescale the noise schedule to zero terminal SNR")
    no_half_vae: bool = option(False, "run the VAE in fp32 (always done for an SDXL VAE whose config requires it)")
    fp16: bool = option(False, "run the models in fp16")
    bf16: bool = option(False, "run the models in bf16")
    diffusers_xformers: bool = option(False, "the same as --xformers")
    opt_channels_last: bool = option(False, "use the channels-last memory format for the U-Net and the VAE")
    offload: str | None = option(
        None,
        "keep the models in CPU memory and move each model (slower) or each layer (much slower) to the device while it "
        "computes",
        unset="all models stay on the device",
        choices=["model", "sequential"],
    )
    device: str | None = option(None, "device to run on: cuda, cuda:1, mps or cpu", unset="the first one available")


@dataclass
class PromptOptions:
    """Prompts, seeds and input images."""

    title: ClassVar[str] = "prompts"
    prompt: str | None = option(
        None, "prompt, optionally followed by options: a cat --n blurry --w 512 --h 768 --d 1,2"
    )
    from_file: str | None = option(
        None, "file of prompts, one per line; blank lines and lines that start with # are skipped"
    )
    images_per_prompt: int = option(1, "images per prompt", **_COUNT)
    n_iter: int = option(1, "number of passes over all prompts", **_COUNT)
    shuffle_prompts: bool = option(False, "shuffle the prompts in each pass")
    seed: int | None = option(
        None,
        "random seed; with several images, each gets its own seed, derived from this one",
        unset="chosen at random",
        at_least=0,
        at_most=MAX_SEED,
        range_error=f"seeds are 0 to {MAX_SEED}",
    )
    iter_same_seed: bool = option(
        False, "use the same seed for all prompts; it is increased by 1 for each further image of a prompt"
    )
    image_path: str | None = option(
        None, "img2img: input image, or folder of images; if no prompt is given, those stored in the images are used"
    )
    strength: float | None = option(None, "img2img: strength of the change, above 0 and at most 1", unset="0.8")


@dataclass
class SamplingOptions:
    """Sampling."""

    title: ClassVar[str] = "sampling"
    W: int | None = option(None, "image width in pixels", unset="the size the model was trained at")
    H: int | None = option(None, "image height in pixels", unset="the size the model was trained at")
    steps: int = option(50, "number of sampling steps")
    scale: float | None = option(None, "guidance scale", unset="7.5; Flux.1: 3.5; Chroma and others: their pipeline's")
    sampler: str = option("ddim", "sampler (not used for transformers, which have their own)", choices=list(SAMPLERS))
    force_scheduler_zero_steps_offset: bool = option(False, "set the scheduler's steps_offset to 0")
    batch_size: int = option(1, "batch size", **_COUNT)
    vae_batch_size: float | None = option(
        None,
        "batch size of the VAE; below 1, a fraction of --batch_size",
        unset="--batch_size",
        above=0,
        range_error="give more than 0",
    )
    clip_skip: int | None = option(
        None, "use the n-th layer from the end of the text encoder", unset="the last layer; SDXL: always 2", **_COUNT
    )
    max_embeddings_multiples: int | None = option(
        None, "maximum length of prompts, in multiples of 75 tokens", unset="no limit", **_COUNT
    )
    emb_normalize_mode: str = option(
        "original",
        "what to preserve when prompt weights are applied: the mean of the embedding (original), the mean of its "
        "absolute values (abs), or nothing (none)",
        choices=["original", "abs", "none"],
    )
    original_height: int | None = option(None, "SDXL micro-conditioning: original height", unset="the image height")
    original_width: int | None = option(None, "SDXL micro-conditioning: original width", unset="the image width")
    negative_original_height: int | None = option(
        None,
        "SDXL micro-conditioning: original height for the negative prompt",
        unset="--original_height",
        flag="--original_height_negative",
    )
    negative_original_width: int | None = option(
        None,
        "SDXL micro-conditioning: original width for the negative prompt",
        unset="--original_width",
        flag="--original_width_negative",
    )
    crop_top: int | None = option(None, "SDXL micro-conditioning: top crop coordinate", unset="0")
    crop_left: int | None = option(None, "SDXL micro-conditioning: left crop coordinate", unset="0")


@dataclass
class AdapterOptions:
    """Adapters."""

    title: ClassVar[str] = "adapters"
    network_module: list[str] | None = option(
        None, "networks.lora or networks.dylora: one for all files, or one for each", unset="detected from each file"
    )
    network_weights: list[str] | None = option(
        None, "adapter files, folders or Hub ids, optionally with weights (FILE:0.8:lbw=MIDD)"
    )
    network_mul: list[float] | None = option(None, "weight of each adapter", unset="1")
    network_args: list[str] | None = option(
        None, "options of each DyLoRA: rank=, unit=, rank_scaling=", metavar="K=V;K=V"
    )
    network_merge: bool = option(False, "merge all adapters into the model's weights")
    network_merge_n_models: int | None = option(None, "merge the first n adapters into the model's weights")
    network_pre_calc: bool = option(
        False, "merge adapters into a copy of the weights for each batch: fastest, and exact"
    )
    network_show_meta: bool = option(False, "print the metadata of the adapter files")
    rank: int | None = option(None, "rank at which DyLoRA adapters are applied", unset="the full rank")


@dataclass
class FileOptions:
    """Files that are written."""

    title: ClassVar[str] = "files"
    outdir: str = option("outputs", "folder for the images")
    sequential_file_name: bool = option(
        False, "name images im_000001.png, im_000002.png, ... instead of by time, number and seed"
    )
    use_original_file_name: bool = option(False, "img2img: use the file name of the input image")


@dataclass
class SheetOptions:
    """A sheet of images with different settings."""

    title: ClassVar[str] = "comparison sheet"
    sweep: list[str] | None = option(
        None,
        "generate one sheet of images instead of single images, with a row for each prompt and a column for each "
        "setting: weight=0,0.5,1 rank=4,8 steps= scale= sampler=",
        metavar="NAME=V,V,...",
        at_least_one=True,
    )
    sheet: str | None = option(None, "file of the sheet", unset="sweep_<time>.png in --outdir")
    sheet_font: str | None = option(
        None, "TrueType font for the labels of the sheet", unset="built-in, Latin letters only"
    )


@dataclass
class GenerateSettings(
    BaseOptions, PromptOptions, SamplingOptions, AdapterOptions, FileOptions, SheetOptions, RefusedOptions, Given
):
    """The options of the image generation program, one attribute each."""


def parser(defaults: bool = True) -> Parser:
    """Create the parser. Without `defaults`, parsed arguments contain only the options on the command line."""
    new = Parser(
        prog="gen_img_diffusers.py",
        description="Generate images with a base model and adapters, with the options of kohya's gen_img.",
        examples=[
            '--ckpt MODEL --network_weights a.safetensors --network_mul 0.8 --prompt "a cat --n blurry"',
            "--ckpt MODEL --network_weights dylora.safetensors --from_file prompts.txt --sweep weight=0,0.5,1 rank=4,8",
        ],
    )
    new.add_options(GenerateSettings, defaults)
    return new


def parse(argv: Sequence[str] | None = None) -> GenerateSettings:
    """Parse `argv` and add the defaults. OptionError for an unsupported option."""
    settings = made(GenerateSettings, vars(parser(defaults=False).parse_args(argv)))
    refuse(settings)
    return settings
