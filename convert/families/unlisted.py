"""The family for adapters of an unknown model: layers keep their names in the file, and nothing else is known of them.

Only operations that need no more work on these adapters: showing their contents, sums, other ranks, averages. It is not
in `registry.FAMILIES`, so that it is used only if the user chooses it.
"""

import re
from collections.abc import Iterable

from lora_adapters.convert.choices import OTHER
from lora_adapters.convert.errors import AdapterError

from .blocks import StackBlocks
from .family import Coverage, Marks, ModelFamily, Version
from .names import ModuleName
from .transformer import Transformer

COMPONENT = "model"  # the component of all modules, since names do not tell the part of the pipeline
_BEGINNING = re.compile(r"^(lora_unet_|lora_|lycoris_|(model\.)?diffusion_model\.|transformer\.)")
_BLOCK = re.compile(r"(.*?)(\d+)(?=[._])")
_TRANSFORMER = Transformer(stacks=(), outer={})


class _Unlisted(ModelFamily):
    """The family of unknown models, whose modules are named by their complete names in files, flat or dotted."""

    def kohya_name(self, module: ModuleName) -> str:
        """The name of a module in its file."""
        return module.path

    def has(self, modules: Iterable[ModuleName]) -> bool:
        """Whether all of the modules were read without a family."""
        return all(module.component == COMPONENT for module in modules)

    def adapter_type(self, modules: Iterable[ModuleName]) -> Coverage:
        """An empty coverage, since adapter types are not known for these models."""
        return Coverage("", (), frozenset(), True)

    def block_label(self, module: ModuleName) -> str:
        """The module's name up to its first number, which is padded to two digits: `blocks.07`."""
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
    """Whether a name is flat like kohya's, with underscores instead of dots."""
    return "." not in name


def check_alike(adapters: Iterable[tuple[str, Iterable[ModuleName]]]) -> None:
    """Refuse to combine adapters whose names are spelled differently, since these cannot be matched.

    Args:
        adapters: The name and the modules of each adapter.

    Raises:
        AdapterError: Some adapters have flat names, others dotted names.
    """
    spelled = [(name, {is_flat(module.path) for module in modules}) for name, modules in adapters]
    first, flat = spelled[0]
    for name, other in spelled[1:]:
        if flat != other:
            raise AdapterError(
                f"{first} and {name} spell the layer names differently (with and without dots), and the names of an "
                "unknown model cannot be matched: convert one of them with a program that knows the model"
            )
