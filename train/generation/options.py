"""The options of the picture program, under the names of kohya's gen_img; those it does not support, with reasons."""

import argparse

from lora_adapters.convert.parsing import number
from lora_adapters.train.errors import OptionError
from lora_adapters.train.options.parser import Parser, add_attention, add_model_source, adders
from lora_adapters.train.samplers import SAMPLERS

_CONTROL = "ControlNet is not supported: use diffusers' StableDiffusionControlNetPipeline with pipe.load_lora_weights"
_HIGHRES = (
    "highres fix is not supported: draw small, then give the picture to --image_path with --W, --H and --strength"
)
_SHRINK = "Deep Shrink is not supported"
_GRADUAL = "Gradual Latent is not supported"
_GUIDANCE = "guidance by CLIP or VGG16 is not supported"
_EMBEDDINGS = "embeddings are not supported: use pipe.load_textual_inversion of diffusers"
_MASK = "masks (inpainting, regions) are not supported"
_NOISE = "other starting noise is not supported"
_NEGATIVE_SCALE = "a scale of its own for the negative prompt is not supported"

UNSUPPORTED: dict[str, str] = {
    "from_module": "prompts from Python modules are not supported; use --from_file",
    "prompter_module_args": "prompts from Python modules are not supported; use --from_file",
    "interactive": "typing prompts is not supported; use --prompt or --from_file",
    "no_preview": "typing prompts is not supported, so there is no preview",
    "mask_path": _MASK,
    "network_regional_mask_max_color_codes": _MASK,
    "vae_slices": "it is not supported; --vae_batch_size 1 saves memory, too",
    "textual_inversion_embeddings": _EMBEDDINGS,
    "XTI_embeddings": _EMBEDDINGS,
    "negative_scale": _NEGATIVE_SCALE,
    "pyramid_noise_prob": _NOISE,
    "pyramid_noise_discount_range": _NOISE,
    "noise_offset_prob": _NOISE,
    "noise_offset_range": _NOISE,
    **dict.fromkeys(("clip_vision_strength", "clip_guidance_scale", "clip_image_guidance_scale"), _GUIDANCE),
    **dict.fromkeys(("vgg16_guidance_scale", "vgg16_guidance_layer", "guide_image_path"), _GUIDANCE),
    **{f"highres_fix_{name}": _HIGHRES for name in ("scale", "steps", "strength", "save_1st", "latents_upscaling",
       "upscaler", "upscaler_args", "disable_control_net")},
    **{f"control_net_{name}": _CONTROL for name in ("models", "preps", "multipliers", "weights", "ratios",
       "lllite_models")},
    **{f"ds_{name}": _SHRINK for name in ("depth_1", "timesteps_1", "depth_2", "timesteps_2", "ratio")},
    **{f"gradual_latent_{name}": _GRADUAL for name in ("timesteps", "ratio", "ratio_step", "every_n_steps", "s_noise",
       "unsharp_params")},
}  # fmt: skip

UNSUPPORTED_IN_LINES: dict[str, str] = {
    "nl": f"({_NEGATIVE_SCALE})",
    "c": f"({_GUIDANCE})",
    **dict.fromkeys(("dsd1", "dst1", "dsd2", "dst2", "dsr"), f"({_SHRINK})"),
    **dict.fromkeys(("glt", "glr", "gls", "gle", "glsn", "glus"), f"({_GRADUAL})"),
}


def parser() -> argparse.ArgumentParser:
    """All options with their defaults."""
    made = Parser(prog="gen_img_diffusers.py", description="Draw pictures with Stable Diffusion and adapters.")
    _add_model(made.add_argument_group("model"))
    _add_prompts(made.add_argument_group("what to draw"))
    _add_sampling(made.add_argument_group("how to draw it"))
    _add_networks(made.add_argument_group("adapters"))
    _add_files(made.add_argument_group("files"))
    _add_sheet(made.add_argument_group("a sheet of settings"))
    for name in UNSUPPORTED:
        made.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return made


def refuse(options: argparse.Namespace) -> None:
    """Raise TrainingError for the first unsupported option that is given."""
    for name, reason in UNSUPPORTED.items():
        if getattr(options, name) is not None:
            raise OptionError(f"--{name}: {reason}")


def _add_model(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--ckpt", dest="pretrained_model_name_or_path", help="checkpoint file, Diffusers folder or hub id")
    flag("--v1", help="the model must be SD1.x (it is recognised without this)")
    flag("--sdxl", help="the model must be SDXL (it is recognised without this)")
    flag("--zero_terminal_snr", help="betas that end in pure noise")
    flag("--no_half_vae", help="the VAE computes in fp32 (an SDXL VAE that asks for it does so in any case)")
    add_model_source(group)
    flag("--fp16", help="compute in fp16")
    flag("--bf16", help="compute in bf16")
    add_attention(group)
    flag("--diffusers_xformers", help="the same as --xformers")
    flag("--opt_channels_last", help="weights of the U-Net and the VAE in channels-last order")
    option("--device", help="cuda, cuda:1, mps, cpu (default: the first of these that there is)")


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--prompt", help="prompt, with options behind it: a cat --n blurry --w 512 --h 768 --d 1,2")
    option("--from_file", help="file of prompts, one a line; blank lines and lines with # are left out")
    option("--images_per_prompt", type=int, default=1, help="pictures for each prompt")
    option("--n_iter", type=int, default=1, help="go through all prompts so many times")
    flag("--shuffle_prompts", help="in another order each time")
    option("--seed", type=int, help="seed of the pictures' seeds; of the picture itself where there is but one")
    flag("--iter_same_seed", help="the same seed for all prompts; a prompt's further pictures count on from it")
    option("--image_path", help="picture or folder of pictures to start from; without prompts, theirs are taken")
    option("--strength", type=number, help="how much of such a picture is drawn anew, above 0, up to 1 (default 0.8)")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--W", type=int, help="width in pixels (default: the size that the model was trained at)")
    option("--H", type=int, help="height in pixels")
    option("--steps", type=int, default=50, help="sampling steps (default 50)")
    option("--scale", type=number, default=7.5, help="guidance scale (default 7.5)")
    option("--sampler", default="ddim", choices=list(SAMPLERS), help="sampler (default ddim)")
    flag("--force_scheduler_zero_steps_offset", help="the sampler's steps_offset is 0")
    option("--batch_size", type=int, default=1, help="pictures at a time")
    option("--vae_batch_size", type=number, help="pictures at a time in the VAE; below 1, a part of --batch_size")
    option("--clip_skip", type=int, help="take the text encoder's n-th layer from the end (SDXL: always 2)")
    option("--max_embeddings_multiples", type=int, help="longest prompt, in windows of 75 tokens (default: no limit)")
    modes = ["original", "abs", "none"]
    option("--emb_normalize_mode", default="original", choices=modes, help="what words' weights leave as it was: "
           "the mean of the text's embedding, the mean of its absolute values, or nothing")  # fmt: skip
    for name in ("original", "negative_original"):
        kohyas = [f"--original_{side}" + ("_negative" if name[0] == "n" else "") for side in ("height", "width")]
        for flags, side in zip(kohyas, ("height", "width"), strict=True):
            option(flags, dest=f"{name}_{side}", type=int, help=f"SDXL: {side} of the picture that it was cut from")
    option("--crop_top", type=int, help="SDXL: pixels cut off at the top")
    option("--crop_left", type=int, help="SDXL: pixels cut off at the left")


def _add_networks(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--network_module", nargs="*", help="networks.lora, networks.dylora; one for each file, or one for all")
    option("--network_weights", nargs="*", help="adapter files, folders or hub ids; FILE:0.8:lbw=MIDD too")
    option("--network_mul", type=number, nargs="*", help="their weights (default 1 each)")
    option("--network_args", nargs="*", metavar="K=V;K=V", help="for each DyLoRA: rank=, unit=, rank_scaling=")
    flag("--network_merge", help="add all adapters to the model's weights")
    option("--network_merge_n_models", type=int, help="add the first n to the model's weights")
    flag("--network_pre_calc", help="add adapters to the weights for each batch, from a copy of these: fastest, exact")
    flag("--network_show_meta", help="print the files' metadata")
    option("--rank", type=int, help="rank that DyLoRA adapters work at (default: the full one)")


def _add_files(group: argparse._ArgumentGroup) -> None:
    flag, option = adders(group)
    option("--outdir", default="outputs", help="folder of the pictures (default outputs)")
    flag("--sequential_file_name", help="im_000001.png, im_000002.png, ...; without it, time, number and seed")
    flag("--use_original_file_name", help="with --image_path: the name of that picture")


def _add_sheet(group: argparse._ArgumentGroup) -> None:
    _, option = adders(group)
    option("--sweep", nargs="+", metavar="NAME=V,V,...", help="draw one sheet instead of pictures, with a row for "
           "each prompt and a column for each setting: weight=0,0.5,1 rank=4,8 steps= scale= sampler=")  # fmt: skip
    option("--sheet", help="its file (default: sweep_<time>.png in --outdir)")
    option("--sheet_font", help="TrueType font for its labels (the built-in one is Latin only)")
