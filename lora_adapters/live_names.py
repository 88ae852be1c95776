"""Finding modules of live models by their names in files, if they are in no table of the families.

Examples are AnimateDiff's motion modules, blocks of the refiner and the x4 upscaler, text-to-video's temporal layers,
and T5's layers.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.names import text_path
from lora_adapters.convert.families.registry import by_class, role_of
from lora_adapters.convert.families.unet import original_name
from lora_adapters.types.layers import ADDED


class LiveNames:
    """A `lora_adapters.convert.families.names.Lookup` in the components of a pipeline.

    The modules of a component are listed once, at the first lookup.
    """

    def __init__(self, models: Mapping[str, nn.Module]):
        self._models = models
        self._tables: dict[str, dict[str, str]] = {}

    @property
    def family(self) -> ModelFamily | None:
        """The family of the first model that is a known denoiser, by its class; None if there is none."""
        families = (by_class(model) for model in self._models.values())
        return next((family for family in families if family is not None), None)

    def __call__(self, component: str, name: str) -> str:
        """The path of the module with this dotted or flat name; the name itself if no such module exists."""
        model = self._models.get(component)
        if model is None:
            return name
        if component not in self._tables:
            self._tables[component] = _by_flat_name(model, component)
        table, flat = self._tables[component], name.replace(".", "_")
        if role_of(component) != "text_encoder":
            return table.get(flat, name)
        path = table.get(flat) or table.get(flat.removeprefix("text_model_"))
        return name if path is None else text_path(path)


def _by_flat_name(model: Any, component: str) -> dict[str, str]:
    """All modules with weights by flat name; those of a U-Net also by their names in the original code.

    Ambiguous flat names are left out.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if path and not any(part in f".{path}" for part in ADDED) and hasattr(module, "weight")
    ]
    spelled = [(path.replace(".", "_"), path) for path in paths]
    if role_of(component) == "denoiser":
        spelled += _original_names(model, paths)
    table: dict[str, str] = {}
    for flat, path in spelled:
        table[flat] = path if table.get(flat, path) == path else ""
    return {flat: path for flat, path in table.items() if path}


def _original_names(model: Any, paths: list[str]) -> list[tuple[str, str]]:
    """(flat name in the original code, path) of a U-Net's modules, if all blocks have the same number of layers."""
    layers = getattr(getattr(model, "config", None), "layers_per_block", None)
    if not isinstance(layers, int):
        return []
    blocks = {path.split(".")[1] for path in paths if path.startswith("up_blocks.")}
    attended = {path.split(".")[1] for path in paths if path.startswith("up_blocks.") and ".attentions." in path}
    named = ((original_name(path, blocks - attended, layers), path) for path in paths)
    return [(name.replace(".", "_"), path) for name, path in named if name is not None]
