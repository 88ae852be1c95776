"""Module names: a component of a pipeline and the dotted path of a layer in it, as in diffusers."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lora_adapters.convert.suggestions import closest

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
TEXT_PROJECTION = "text_projection"  # in SDXL's second text encoder, on the same level as `text_model`
NEAREST = "the nearest known name is"
_NOT_BELOW_TEXT_MODEL = ("text_model.", "encoder.block.", "layers.")

# A function that finds modules that are in none of the tables: it maps a component and a name, dotted or flat, to the
# path. Unknown names are returned unchanged.
Lookup = Callable[[str, str], str]


class ModuleName(NamedTuple):
    """One adapted module: `component` is one of COMPONENTS, `path` its dotted name in diffusers.

    The paths of CLIP text encoders begin with `text_model.` for all versions of transformers, except `text_projection`.

    >>> str(ModuleName("unet", "mid_block.attentions.0.proj_in"))
    'unet.mid_block.attentions.0.proj_in'
    """

    component: str
    path: str

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


def bias_of(module: ModuleName) -> ModuleName:
    """The name under which the bias of a module is listed in tables of weights.

    Args:
        module: The module.

    Returns:
        The name of its bias.

    >>> str(bias_of(ModuleName("unet", "conv_in")))
    'unet.conv_in.bias'
    """
    return module._replace(path=f"{module.path}.bias")


def text_path(path: str) -> str:
    """Add `text_model.` to the path of a layer of a CLIP text encoder; some formats and transformers 5 omit it.

    Args:
        path: A path with or without `text_model.`. Paths of other text encoders, T5 (`encoder.block.0...`) and language
            models (`layers.0...`), are returned unchanged.

    Returns:
        The path with `text_model.`.

    >>> text_path("encoder.layers.0.mlp.fc1"), text_path("text_projection")
    ('text_model.encoder.layers.0.mlp.fc1', 'text_projection')
    """
    return path if path.startswith(_NOT_BELOW_TEXT_MODEL) or path == TEXT_PROJECTION else f"text_model.{path}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name, to be appended to an error message.

    Args:
        name: The unknown name.
        known: The known names. Only names with the same numbers are considered, since another number is another block.

    Returns:
        `; the nearest known name is X`, or an empty string if no name is similar.

    >>> nearest("mid_block.atentions.0.proj_in", ["mid_block.attentions.0.proj_in", "mid_block.attentions.1.proj_in"])
    '; the nearest known name is mid_block.attentions.0.proj_in'
    """
    if len(name) > 120:  # no module name is so long, and difflib's time grows with the length
        return ""
    numbers = re.findall(r"\d+", name)
    near = closest(name, (candidate for candidate in known if re.findall(r"\d+", candidate) == numbers), 0.8)
    return f"; {NEAREST} {near}" if near else ""
