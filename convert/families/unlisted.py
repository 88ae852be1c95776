"""A model that no family describes: its layers are called what the file calls them, and nothing else is known of them.

What needs no more is done with its adapters: what they hold, sums, other ranks, averages. It is not one of
`registry.FAMILIES`, so that no file is taken for one of these unless somebody says so.
"""

import re
from collections.abc import Iterable

from lora_adapters.convert.choices import OTHER
from lora_adapters.convert.errors import AdapterError

from .blocks import StackBlocks
from .family import Coverage, Marks, ModelFamily, Version
from .names import ModuleName
from .transformer import Transformer

COMPONENT = "model"  # of all modules: names do not tell which part of the pipeline they are of
_BEGINNING = re.compile(r"^(lora_unet_|lora_|lycoris_|(model\.)?diffusion_model\.|transformer\.)")
_BLOCK = re.compile(r"(.*?)(\d+)(?=[._])")
_TRANSFORMER = Transformer(stacks=(), outer={})


class _Unlisted(ModelFamily):
    """See the module; an adapter's names are whole names of files, flat or dotted."""

    def kohya_name(self, module: ModuleName) -> str:
        """The name of a module in its file."""
        return module.path

    def has(self, modules: Iterable[ModuleName]) -> bool:
        """Whether all of the modules were read without a family."""
        return all(module.component == COMPONENT for module in modules)

    def adapter_type(self, modules: Iterable[ModuleName]) -> Coverage:
        """Of all that there is."""
        return Coverage("", (), frozenset(), True)

    def block_label(self, module: ModuleName) -> str:
        """The beginning of a module's name up to its first number, with two digits: `blocks.07`."""
        name = _BEGINNING.sub("", module.path)
        match = _BLOCK.match(name)
        return f"{match[1]}{int(match[2]):02d}" if match else "-"


UNLISTED = _Unlisted(
    name=OTHER,
    title="another model",
    versions=(
        Version(
            title="another model",
            long_title="another model",
            value=OTHER,
            modelspec=OTHER,
            resolution="",
            repository="",
            text_width=0,
            prediction=None,
        ),
    ),
    metadata=(OTHER,),
    components=(_TRANSFORMER.denoiser()._replace(name=COMPONENT, kohya="lora_unet"),),
    blocks=StackBlocks(()),
    coverage={},
    part_of=lambda path: "outer",
    kind_of=lambda path: "linear",
    marks=Marks(),
    formats=frozenset(),
    implementation="",
    options={},
    tag="",
)


def is_flat(name: str) -> bool:
    """Whether a name is one of kohya's, with underscores for dots."""
    return "." not in name


def check_alike(adapters: Iterable[tuple[str, Iterable[ModuleName]]]) -> None:
    """Refuse to put adapters together whose names are in different spellings, which nobody can translate here.

    Args:
        adapters: The name of each, and its modules.

    Raises:
        AdapterError: One has flat names, another dotted ones.
    """
    spelled = [(name, {is_flat(module.path) for module in modules}) for name, modules in adapters]
    first, flat = spelled[0]
    for name, other in spelled[1:]:
        if flat != other:
            raise AdapterError(
                f"{first} and {name} spell the names of layers differently (with dots and without), and the model is "
                "not known here: bring them into one spelling with the program that knows it"
            )
