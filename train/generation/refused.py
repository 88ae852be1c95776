"""Options of kohya's gen_img that are not supported, each with the reason."""

from dataclasses import dataclass
from typing import ClassVar

from lora_adapters.train.options.option import option

_CONTROL = "ControlNet is not supported: use diffusers' StableDiffusionControlNetPipeline with pipe.load_lora_weights"
_HIGHRES = "highres fix is not supported: draw small, then give the image to --image_path with --W, --H and --strength"
_SHRINK = "Deep Shrink is not supported"
_GRADUAL = "Gradual Latent is not supported"
_GUIDANCE = "guidance by CLIP or VGG16 is not supported"
_EMBEDDINGS = "embeddings are not supported: use pipe.load_textual_inversion of diffusers"
_MASK = "masks (inpainting, regions) are not supported"
_NOISE = "other starting noise is not supported"
_NEGATIVE_SCALE = "a scale of its own for the negative prompt is not supported"
_MODULES = "prompts from Python modules are not supported; use --from_file"
_TYPING = "typing prompts is not supported; use --prompt or --from_file"
Refused = list[str] | None  # with or without values

UNSUPPORTED_IN_LINES: dict[str, str] = {
    "nl": f"({_NEGATIVE_SCALE})",
    "c": f"({_GUIDANCE})",
    **dict.fromkeys(("dsd1", "dst1", "dsd2", "dst2", "dsr"), f"({_SHRINK})"),
    **dict.fromkeys(("glt", "glr", "gls", "gle", "glsn", "glus"), f"({_GRADUAL})"),
}


@dataclass
class RefusedOptions:
    """Unsupported options."""

    title: ClassVar[str] = "not supported"
    from_module: Refused = option(None, "", unsupported=_MODULES)
    prompter_module_args: Refused = option(None, "", unsupported=_MODULES)
    interactive: Refused = option(None, "", unsupported=_TYPING)
    no_preview: Refused = option(None, "", unsupported=_TYPING)
    mask_path: Refused = option(None, "", unsupported=_MASK)
    network_regional_mask_max_color_codes: Refused = option(None, "", unsupported=_MASK)
    vae_slices: Refused = option(None, "", unsupported="it is not supported; --vae_batch_size 1 saves memory, too")
    textual_inversion_embeddings: Refused = option(None, "", unsupported=_EMBEDDINGS)
    XTI_embeddings: Refused = option(None, "", unsupported=_EMBEDDINGS)
    negative_scale: Refused = option(None, "", unsupported=_NEGATIVE_SCALE)
    pyramid_noise_prob: Refused = option(None, "", unsupported=_NOISE)
    pyramid_noise_discount_range: Refused = option(None, "", unsupported=_NOISE)
    noise_offset_prob: Refused = option(None, "", unsupported=_NOISE)
    noise_offset_range: Refused = option(None, "", unsupported=_NOISE)
    clip_vision_strength: Refused = option(None, "", unsupported=_GUIDANCE)
    clip_guidance_scale: Refused = option(None, "", unsupported=_GUIDANCE)
    clip_image_guidance_scale: Refused = option(None, "", unsupported=_GUIDANCE)
    vgg16_guidance_scale: Refused = option(None, "", unsupported=_GUIDANCE)
    vgg16_guidance_layer: Refused = option(None, "", unsupported=_GUIDANCE)
    guide_image_path: Refused = option(None, "", unsupported=_GUIDANCE)
    highres_fix_scale: Refused = option(None, "", unsupported=_HIGHRES)
    highres_fix_steps: Refused = option(None, "", unsupported=_HIGHRES)
    highres_fix_strength: Refused = option(None, "", unsupported=_HIGHRES)
    highres_fix_save_1st: Refused = option(None, "", unsupported=_HIGHRES)
    highres_fix_latents_upscaling: Refused = option(None, "", unsupported=_HIGHRES)
    highres_fix_upscaler: Refused = option(None, "", unsupported=_HIGHRES)
    highres_fix_upscaler_args: Refused = option(None, "", unsupported=_HIGHRES)
    highres_fix_disable_control_net: Refused = option(None, "", unsupported=_HIGHRES)
    control_net_models: Refused = option(None, "", unsupported=_CONTROL)
    control_net_preps: Refused = option(None, "", unsupported=_CONTROL)
    control_net_multipliers: Refused = option(None, "", unsupported=_CONTROL)
    control_net_weights: Refused = option(None, "", unsupported=_CONTROL)
    control_net_ratios: Refused = option(None, "", unsupported=_CONTROL)
    control_net_lllite_models: Refused = option(None, "", unsupported=_CONTROL)
    ds_depth_1: Refused = option(None, "", unsupported=_SHRINK)
    ds_timesteps_1: Refused = option(None, "", unsupported=_SHRINK)
    ds_depth_2: Refused = option(None, "", unsupported=_SHRINK)
    ds_timesteps_2: Refused = option(None, "", unsupported=_SHRINK)
    ds_ratio: Refused = option(None, "", unsupported=_SHRINK)
    gradual_latent_timesteps: Refused = option(None, "", unsupported=_GRADUAL)
    gradual_latent_ratio: Refused = option(None, "", unsupported=_GRADUAL)
    gradual_latent_ratio_step: Refused = option(None, "", unsupported=_GRADUAL)
    gradual_latent_every_n_steps: Refused = option(None, "", unsupported=_GRADUAL)
    gradual_latent_s_noise: Refused = option(None, "", unsupported=_GRADUAL)
    gradual_latent_unsharp_params: Refused = option(None, "", unsupported=_GRADUAL)
