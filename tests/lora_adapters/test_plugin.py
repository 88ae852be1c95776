"""What is changed in peft and diffusers is looked for first: one line says what a version lacks."""

import inspect
from types import ModuleType

import peft
import pytest
from diffusers.loaders import lora_base, lora_pipeline, textual_inversion, unet_loader_utils
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import peft_utils
from peft import peft_model
from peft.tuners.lora import Linear, LoraModel
from peft.utils import hotswap as peft_hotswap

from lora_adapters import (
    adapter_weights,
    fusing,
    hotswap,
    model_loading,
    pipeline,
    plugin,
    save_hook,
    stacking,
    tuner,
)

plugin._into_layers()
# What is put in the place of what.
REPLACED = [
    (plugin._loading, lora_pipeline.StableDiffusionLoraLoaderMixin.load_lora_weights),
    (plugin._loading, lora_pipeline.StableDiffusionXLLoraLoaderMixin.load_lora_weights),
    (plugin._loading, lora_pipeline.FluxLoraLoaderMixin.load_lora_weights),
    (plugin._saving_of_models, PeftAdapterMixin.save_lora_adapter),
    (model_loading.loading, PeftAdapterMixin.load_lora_adapter),
    (model_loading.loading_text, lora_base._load_lora_into_text_encoder),
    (fusing.fusing, PeftAdapterMixin.fuse_lora),
    (fusing.fusing_pipelines, lora_base.LoraBaseMixin.fuse_lora),
    (pipeline.forgetting, lora_base.LoraBaseMixin.unload_lora_weights),
    (pipeline.forgetting, lora_base.LoraBaseMixin.delete_adapters),
    (pipeline.inverting, textual_inversion.TextualInversionLoaderMixin.load_textual_inversion),
    (adapter_weights.scaling, peft_utils.scale_lora_layers),
    (adapter_weights.unscaling, peft_utils.unscale_lora_layers),
    (adapter_weights.activating, peft_utils.set_weights_and_activate_adapters),
    (adapter_weights.checking_blocks, unet_loader_utils._maybe_expand_lora_scales_for_one_adapter),
    (save_hook.cutting, peft_model.get_peft_model_state_dict),
    (tuner.injecting, LoraModel.inject_adapter),
    (tuner.creating, LoraModel._create_and_replace),
    (tuner.combining, LoraModel.add_weighted_adapter),
    (tuner.unloading, LoraModel._unload_and_optionally_merge),
    (hotswap.preparing, peft_hotswap.prepare_model_for_compiled_hotswap),
    (hotswap.exchanging, peft_hotswap.hotswap_adapter_from_state_dict),
    (fusing.merging, Linear.merge),
    (fusing.unmerging, Linear.unmerge),
    (stacking.stacked, Linear.forward),
]


@pytest.mark.parametrize(("wrapper", "ours"), REPLACED, ids=[ours.__qualname__ for _, ours in REPLACED])
def test_arguments_are_taken_as_the_original_takes_them(wrapper, ours) -> None:
    original = inspect.signature(ours.stock).parameters.values()
    kinds = inspect.Parameter
    by_position = [part.name for part in original if part.kind is kinds.POSITIONAL_OR_KEYWORD]
    by_name = {part.name: part.name for part in original if part.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)}
    mine = inspect.signature(wrapper(ours.stock), follow_wrapped=False)
    named = [part.name for part in mine.parameters.values() if part.kind is kinds.POSITIONAL_OR_KEYWORD]
    assert not any(part.kind is kinds.KEYWORD_ONLY and part.name in by_position for part in mine.parameters.values())
    bound = mine.bind(*by_position).arguments
    assert all(bound[name] == name for name in named if name in bound)
    if "self" in by_name:
        mine.bind("self", **{name: name for name in by_name if name != "self"})
    else:
        mine.bind(**by_name)


def test_diffusers_without_what_is_changed() -> None:
    with pytest.raises(ImportError, match=r"lacks StableDiffusionLoraLoaderMixin\.load_lora_weights"):
        plugin._into_diffusers(ModuleType("lora_pipeline"))


def test_peft_that_injects_otherwise(monkeypatch) -> None:
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    monkeypatch.delattr(LoraModel, "inject_adapter")
    monkeypatch.delattr(BaseTuner, "inject_adapter")
    with pytest.raises(ImportError, match="injects layers in an unsupported way"):
        plugin._into_peft(peft)
