"""Every change that this package makes to peft and diffusers, and the checks that both are as expected.

Nothing slow is imported here: a change is made when somebody imports peft or diffusers' pipelines, before or after this
package.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from .compat import check_age, unfit


def plug_in() -> None:
    """Register the changes; each is made at once where its module is imported already."""
    wrapt.register_post_import_hook(_into_peft, "peft")
    wrapt.register_post_import_hook(_into_hotswap, "peft.utils.hotswap")
    wrapt.register_post_import_hook(_into_diffusers, "diffusers.loaders.lora_pipeline")
    wrapt.register_post_import_hook(_into_scaling, "diffusers.utils.peft_utils")
    wrapt.register_post_import_hook(_into_block_weights, "diffusers.loaders.unet_loader_utils")
    wrapt.register_post_import_hook(_into_fusing, "diffusers.loaders.lora_base")
    wrapt.register_post_import_hook(_into_inversion, "diffusers.loaders.textual_inversion")
    wrapt.register_post_import_hook(_into_models, "diffusers.loaders.peft")
    wrapt.register_post_import_hook(_into_adapters, "lora_adapters.convert.live")


def _into_adapters(live: ModuleType) -> None:
    """`Adapter`'s methods for live models and the Hub are those of `lora_adapters.adapter`, loaded when called."""
    live.register(functools.partial(importlib.import_module, "lora_adapters.adapter"))


def _into_peft(peft: ModuleType) -> None:
    """LoRA's tuner and the mixed one learn this package's configs; other adapters are treated as PEFT does."""
    check_age("peft")
    try:
        from peft import peft_model
        from peft.tuners.lora import LoraModel
        from peft.tuners.lora.layer import LoraVariant  # noqa: F401
        from peft.tuners.mixed import MixedModel
    except ImportError as error:
        raise unfit("peft", f"lacks {error.name or error}") from error
    if not (hasattr(LoraModel, "inject_adapter") and hasattr(LoraModel, "_create_and_replace")):
        raise unfit("peft", "injects its layers in another way")
    if not hasattr(MixedModel, "inject_adapter"):
        raise unfit("peft", "makes mixed models in another way")
    for tuner in (LoraModel, MixedModel):
        _wrap(tuner, "inject_adapter", _later(_tuner, "injecting"))
        _wrap(tuner, "_unload_and_optionally_merge", _later(_tuner, "unloading"))
    _wrap(LoraModel, "_create_and_replace", _later(_tuner, "creating"))
    _wrap(LoraModel, "add_weighted_adapter", _later(_tuner, "combining"))
    # What PEFT's models save with; elsewhere it is as it was.
    _wrap(peft_model, "get_peft_model_state_dict", _later(_save_hook, "cutting"))


def _later(load: Callable[[], ModuleType], name: str) -> Callable[[Any], Any]:
    """The wrapper `name` of a module of this package that is loaded at the first call of what it wraps.

    Not before: when peft is imported by such a module, that one is still being loaded itself.
    """

    def wrapper(stock: Any) -> Any:
        made = functools.cache(lambda: getattr(load(), name)(stock))
        return lambda *args, **kwargs: made()(*args, **kwargs)

    return wrapper


def _pipeline() -> ModuleType:
    return importlib.import_module("lora_adapters.pipeline")


def _model_loading() -> ModuleType:
    return importlib.import_module("lora_adapters.model_loading")


def _save_hook() -> ModuleType:
    return importlib.import_module("lora_adapters.save_hook")


def _tuner() -> ModuleType:
    """`lora_adapters.tuner`; it is used before there is any layer of PEFT's, so these are changed now, too."""
    _into_layers()
    return importlib.import_module("lora_adapters.tuner")


def _into_layers() -> None:
    """PEFT's layers compute several active adapters as one, and give the model's own weights back as they were."""
    from peft.tuners.lora import layer

    from .fusing import merging, unmerging
    from .stacking import stacked

    for kind in (layer.Linear, layer._ConvNd):
        for name, wrapper in (("forward", stacked), ("merge", merging), ("unmerge", unmerging)):
            _wrap(kind, name, wrapper)


def _wrap(home: Any, name: str, wrapper: Any) -> None:
    """Put a wrapped function in the place of a class's or module's, once."""
    stock = getattr(home, name)
    if not hasattr(stock, "stock"):
        ours: Any = functools.wraps(stock)(wrapper(stock))
        ours.stock = stock
        setattr(home, name, ours)


def _into_fusing(lora_base: ModuleType) -> None:
    """`fuse_lora` keeps what it overwrites, for `unfuse_lora`; token embeddings leave with their adapters."""
    from .adapter_weights import replace_everywhere
    from .fusing import fusing, fusing_pipelines

    if hasattr(lora_base, "fuse_text_encoder_lora"):
        replace_everywhere(lora_base, "fuse_text_encoder_lora", fusing)
    if hasattr(lora_base, "_load_lora_into_text_encoder"):
        replace_everywhere(lora_base, "_load_lora_into_text_encoder", _later(_model_loading, "loading_text"))
    _wrap(lora_base.LoraBaseMixin, "fuse_lora", fusing_pipelines)
    for name in ("unload_lora_weights", "delete_adapters"):
        _wrap(lora_base.LoraBaseMixin, name, _later(_pipeline, "forgetting"))


def _into_inversion(textual_inversion: ModuleType) -> None:
    """Token embeddings of adapters stay behind those that pipelines load themselves."""
    for name in ("load_textual_inversion", "unload_textual_inversion"):
        _wrap(textual_inversion.TextualInversionLoaderMixin, name, _later(_pipeline, "inverting"))


def _into_models(peft: ModuleType) -> None:
    """See `_into_fusing` and `model_loading`; `save_lora_adapter` refuses what its files have no place for."""
    from .fusing import fusing

    _wrap(peft.PeftAdapterMixin, "fuse_lora", fusing)
    _wrap(peft.PeftAdapterMixin, "save_lora_adapter", _saving_of_models)
    _wrap(peft.PeftAdapterMixin, "load_lora_adapter", _later(_model_loading, "loading"))


def _saving_of_models(stock: Any) -> Any:
    @functools.wraps(stock)
    def save_lora_adapter(
        self: Any, save_directory: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> None:
        from .save_hook import check_pairs

        check_pairs(self, adapter_name, "save_lora_adapter")
        stock(self, save_directory, adapter_name, *args, **kwargs)

    return save_lora_adapter


def _into_hotswap(hotswap: ModuleType) -> None:
    """PEFT's own functions for hot-swapping know this package's adapters."""
    from .adapter_weights import replace_everywhere
    from .hotswap import exchanging, preparing

    for name, wrapper in (
        ("prepare_model_for_compiled_hotswap", preparing),
        ("hotswap_adapter_from_state_dict", exchanging),
    ):
        if not hasattr(hotswap, name):
            raise unfit("peft", f"lacks peft.utils.hotswap.{name}")
        replace_everywhere(hotswap, name, wrapper)


def _into_scaling(peft_utils: ModuleType) -> None:
    """A scale of 0 for one call leaves the weights of adapters as they were before it; weights are set in one go."""
    from .adapter_weights import activating, replace_everywhere, scaling, unscaling

    for name, wrapper in (
        ("scale_lora_layers", scaling),
        ("unscale_lora_layers", unscaling),
        ("set_weights_and_activate_adapters", activating),
    ):
        if not hasattr(peft_utils, name):
            raise unfit("diffusers", f"lacks {name}")
        replace_everywhere(peft_utils, name, wrapper)


def _into_block_weights(unet_loader_utils: ModuleType) -> None:
    """A misspelt block in the weights of an adapter is named."""
    from .adapter_weights import checking_blocks, replace_everywhere

    name = "_maybe_expand_lora_scales_for_one_adapter"
    if hasattr(unet_loader_utils, name):  # without it diffusers says what it says
        replace_everywhere(unet_loader_utils, name, checking_blocks)


def _into_diffusers(lora_pipeline: ModuleType) -> None:
    """`load_lora_weights` of the known families' pipelines reads what this package knows; diffusers gets other kinds.

    `save_lora_weights` writes this package's adapters with their configs, also where its caller hands in none. Those of
    SD and SDXL have to be there; those of other families are changed in versions of diffusers that have them.
    """
    from lora_adapters.convert.families.registry import FAMILIES

    check_age("diffusers")
    check_age("transformers")
    needed = ("StableDiffusionLoraLoaderMixin", "StableDiffusionXLLoraLoaderMixin")
    others = dict.fromkeys(name for family in FAMILIES for name in family.marks.mixins)
    for name in (*needed, *others):
        mixin = getattr(lora_pipeline, name, None)
        if mixin is None or not (hasattr(mixin, "load_lora_weights") and hasattr(mixin, "save_lora_weights")):
            if name in others:
                continue
            raise unfit("diffusers", f"lacks {name}.load_lora_weights or its save_lora_weights")
        if not hasattr(mixin.load_lora_weights, "stock"):
            mixin.load_lora_weights = _loading(mixin.load_lora_weights, only_known=name in others)
            mixin.save_lora_weights = classmethod(_saving(mixin.save_lora_weights.__func__))


def _loading(stock: Any, only_known: bool = False) -> Any:
    """only_known: whether pipelines of models that no family has are left to diffusers."""

    @functools.wraps(stock)
    def load_lora_weights(
        self: Any,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        from .pipeline import is_known, load

        source, own = pretrained_model_name_or_path_or_dict, functools.partial(stock, self)
        if only_known and not is_known(self):
            own(source, adapter_name=adapter_name, hotswap=hotswap, **kwargs)
            return
        load(self, source, own, adapter_name=adapter_name, hotswap=hotswap, **kwargs)

    load_lora_weights.stock = stock  # type: ignore[attr-defined]
    return load_lora_weights


def _saving(stock: Any) -> Any:
    @functools.wraps(stock)
    def save_lora_weights(cls: Any, *args: Any, **kwargs: Any) -> None:
        from .save_changes import saved
        from .save_hook import completed

        bound = inspect.signature(stock).bind(cls, *args, **kwargs)
        if saved(bound.arguments):
            return
        bound.arguments.update(completed(bound.arguments))
        stock(*bound.args, **bound.kwargs)

    return save_lora_weights
