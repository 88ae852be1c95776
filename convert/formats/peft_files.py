"""PEFT tensors in a single file, without the folder's config: which of them cannot be read without it, and why."""

import re
from collections.abc import Collection, Mapping

from lora_adapters.convert.families.kohya_names import PREFIXES

# The tensor names after which PEFT's raw state dicts insert the adapter's name.
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+|ia3_l|b?oft_[Rrs])\.(?!weight$|bias$|scaled_oft$)[^.]+"
)
_ROTATIONS = ".oft_R.weight"
_SCALED_BY_ALPHA = re.compile(r"\.(lora_A\.weight|hada_w1_a|lokr_w[12](_a)?)$")
_ONE_TRAINER = ("ot_branch", "ot_revision", "ot_config")  # OneTrainer's metadata entries
# Prefixes that OneTrainer uses and PEFT does not.
_ITS_NAMES = (*PREFIXES, "lora_", "diffusion_model.", "model.diffusion_model.", "text_encoders.")


def without_adapter_name(key: str) -> str:
    """Remove the adapter's name from a key of PEFT's raw state dict; other keys are returned unchanged.

    Args:
        key: The key.

    Returns:
        The key without the adapter's name.

    >>> without_adapter_name("mid_block.attentions.0.proj_in.lora_A.default.weight")
    'mid_block.attentions.0.proj_in.lora_A.weight'
    """
    return _NAMED.sub(r".\1", key) if key.count(".") > 1 else key


def open_rotation(keys: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """Find a key of a PEFT OFT whose rotation depends on options in PEFT's config.

    OneTrainer's OFT has no such options: it always uses the same series. Its files are recognised by their metadata, by
    module names that PEFT does not use, and by the mark of its scaled OFT.

    Args:
        keys: The keys of a file.
        metadata: Its metadata.

    Returns:
        The key; None if no tensor needs the config.
    """
    if any(entry in metadata for entry in _ONE_TRAINER) or any(key.endswith(".scaled_oft") for key in keys):
        return None
    return next(
        (
            key
            for key in keys
            if "oft_R" in key
            and without_adapter_name(key).endswith(_ROTATIONS)
            and not (key.startswith(_ITS_NAMES) and key.endswith(_ROTATIONS))
        ),
        None,
    )


def open_scale(keys: Collection[str]) -> str | None:
    """Find a key of a module without alpha, whose scale is only in PEFT's config; None if there is no such module."""
    plain = {without_adapter_name(key) for key in keys}
    return next(
        (
            key
            for key in plain
            if (match := _SCALED_BY_ALPHA.search(key)) and f"{key[: match.start()]}.alpha" not in plain
        ),
        None,
    )


ROTATION_FACTS = "how it rotates (use_cayley_neumann, num_cayley_neumann_terms, peft_version)"
SCALE_FACTS = "the scale (r and alpha)"
