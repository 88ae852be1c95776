"""Converting proj_in and proj_out of attentions to their type in the base model: linear layers or 1x1 convolutions."""

from collections.abc import Mapping

from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.families.detection import base_model_of, family_of
from lora_adapters.convert.families.names import ModuleName


def in_own_shapes(modules: Mapping[ModuleName, LowRank], metadata: Mapping[str, str]) -> Mapping[ModuleName, LowRank]:
    """Reshape the pairs of proj_in and proj_out to the shapes of the base model.

    They are linear layers in SD2.x and SDXL, and 1x1 convolutions in SD1.x. kohya's trainer writes those of SD2.x as
    convolutions, which stock diffusers and PEFT do not accept.

    Args:
        modules: The pairs.
        metadata: The metadata of the file. They are ignored if several versions have these modules, in which case only
            the widths are used, since small models of any version can have either shape.

    Returns:
        The pairs; unchanged if the version is unknown.
    """
    several = len(family_of(modules, metadata).versions) > 1
    version = base_model_of(modules, {} if several else metadata).version
    if version is None:
        return modules

    def shaped(module: ModuleName, pair: LowRank) -> LowRank:
        if not module.path.endswith((".proj_in", ".proj_out")) or pair.kernel != (1, 1):
            return pair
        return pair.shaped_like(pair.out_in if version.projections == "linear" else (*pair.out_in, 1, 1))

    return {module: shaped(module, pair) for module, pair in modules.items()}
