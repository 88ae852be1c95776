"""All changes that this package makes to peft and diffusers, with checks that both are as expected.

This module imports nothing slow: each change is made when peft or diffusers' pipelines are imported, before or after
this package.
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
    """Register the changes; if the module to change is already imported, the change is made at once."""
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
    """Implement `Adapter`'s methods for live models and the Hub by `lora_adapters.adapter`, loaded on first use."""
    live.register(functools.partial(importlib.import_module, "lora_adapters.adapter"))


def _into_peft(peft: ModuleType) -> None:
    """Add support for this package's configs to PEFT's LoRA and mixed tuners; other adapters are not affected."""
    check_age("peft")
    try:
        from peft import peft_model
        from peft.tuners.lora import LoraModel
        from peft.tuners.lora.layer import LoraVariant  # noqa: F401
        from peft.tuners.mixed import MixedModel
    except ImportError as error:
        raise unfit("peft", f"lacks {error.name or error}") from error
    if not (hasattr(LoraModel, "inject_adapter") and hasattr(LoraModel, "_create_and_replace")):
        raise unfit("peft", "injects layers in an unsupported way")
    if not hasattr(MixedModel, "inject_adapter"):
        raise unfit("peft", "creates mixed models in an unsupported way")
    for tuner in (LoraModel, MixedModel):
        _wrap(tuner, "inject_adapter", _later(_tuner, "injecting"))
        _wrap(tuner, "_unload_and_optionally_merge", _later(_tuner, "unloading"))
    _wrap(LoraModel, "_create_and_replace", _later(_tuner, "creating"))
    _wrap(LoraModel, "add_weighted_adapter", _later(_tuner, "combining"))
    # Only the function that PEFT's models use for saving is changed.
    _wrap(peft_model, "get_peft_model_state_dict", _later(_save_hook, "cutting"))


def _later(load: Callable[[], ModuleType], name: str) -> Callable[[Any], Any]:
    """The wrapper `name` of a module of this package, which is loaded at the first call of the wrapped function.

    It cannot be loaded earlier: if that module is what imports peft, it is itself only partly loaded.
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
    """`lora_adapters.tuner`. It is used before any PEFT layer is created, so PEFT's layers are changed now too."""
    _into_layers()
    return importlib.import_module("lora_adapters.tuner")


def _into_layers() -> None:
    """Make PEFT's layers compute several active adapters in one product, and unmerge without rounding errors."""
    from peft.tuners.lora import layer

    from .fusing import merging, unmerging
    from .stacking import stacked

    for kind in (layer.Linear, layer._ConvNd):
        for name, wrapper in (("forward", stacked), ("merge", merging), ("unmerge", unmerging)):
            _wrap(kind, name, wrapper)


def _wrap(home: Any, name: str, wrapper: Any) -> None:
    """Replace a function of a class or module by its wrapper, only once."""
    stock = getattr(home, name)
    if not hasattr(stock, "stock"):
        ours: Any = functools.wraps(stock)(wrapper(stock))
        ours.stock = stock
        setattr(home, name, ours)


def _into_fusing(lora_base: ModuleType) -> None:
    """Make `fuse_lora` keep the overwritten weights for `unfuse_lora`; remove token embeddings with their adapters."""
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
    """Keep token embeddings of adapters after those that pipelines load themselves."""
    for name in ("load_textual_inversion", "unload_textual_inversion"):
        _wrap(textual_inversion.TextualInversionLoaderMixin, name, _later(_pipeline, "inverting"))


def _into_models(peft: ModuleType) -> None:
    """See `_into_fusing` and `model_loading`; `save_lora_adapter` refuses changes that its files cannot store."""
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
    """Make PEFT's own functions for hot-swapping support this package's adapters."""
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
    """Keep the weights of adapters when a call uses the scale 0, and make setting weights fast."""
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
    """Report misspelt blocks in the weights of an adapter."""
    from .adapter_weights import checking_blocks, replace_everywhere

    name = "_maybe_expand_lora_scales_for_one_adapter"
    if hasattr(unet_loader_utils, name):  # otherwise diffusers' own message is shown
        replace_everywhere(unet_loader_utils, name, checking_blocks)


def _into_diffusers(lora_pipeline: ModuleType) -> None:
    """Make `load_lora_weights` of pipelines read the types that this package supports; diffusers reads the others.

    `save_lora_weights` writes this package's adapters with their configs, even if the caller does not pass them. The
    pipelines of SD and SDXL must exist; those of other families are changed if the version of diffusers has them.
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
    """The wrapper of `load_lora_weights`; `only_known`: leave pipelines of unknown models to diffusers."""

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
