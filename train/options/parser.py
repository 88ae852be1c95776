"""What the programs' option parsers share: their error, short ways to add options, and the options of a base model."""

import argparse
from collections.abc import Callable
from typing import Any

from lora_adapters.convert.tools import command_line
from lora_adapters.train.errors import OptionError

Add = Callable[..., Any]


class Parser(command_line.Parser):
    """Raises OptionError for a wrong command line.

    Abbreviations are refused: a mistyped option must not become another one.
    """

    failure = OptionError

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)


def adders(group: argparse._ArgumentGroup) -> tuple[Add, Add]:
    """`add_argument` for a switch that is off, and for an option with a value."""

    def flag(name: str, **kwargs: Any) -> None:
        group.add_argument(name, action="store_true", **kwargs)

    return flag, group.add_argument


def add_model_source(group: argparse._ArgumentGroup) -> None:
    """Where the parts of a base model are, and how they are read."""
    flag, option = adders(group)
    option("--model_config", help="Diffusers folder or hub id with the configs and tokenizer for a checkpoint file")
    flag("--v2", help="the model is SD2.x; with this, --v_parameterization alone tells what it predicts")
    flag("--v_parameterization", help="the model predicts v (SD2.x 768)")
    option("--vae", help="another VAE: file, Diffusers folder or hub id")
    option("--tokenizer_cache_dir", help="folder in which configs and tokenizers from the hub are kept")
    flag("--disable_mmap_load_safetensors", help="read safetensors files whole instead of mapping them")


def add_attention(group: argparse._ArgumentGroup) -> None:
    """How attention is computed."""
    flag, _ = adders(group)
    flag("--xformers", help="attention by xformers (CUDA)")
    flag("--sdpa", help="attention by PyTorch's scaled_dot_product_attention (what is used anyway)")
