"""Loads adapters in `pipe.load_lora_weights`."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.base import Delta
from lora_adapters.convert.deltas.sum import as_pair
from lora_adapters.convert.errors import AdapterError, UnknownFormatError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.registry import by_class
from lora_adapters.convert.formats.diffusers import METADATA_KEY
from lora_adapters.convert.formats.kinds import may_go_to_diffusers
from lora_adapters.convert.storage.files import read_tensors
from lora_adapters.convert.storage.hub_errors import HubError
from lora_adapters.convert.storage.mapped_pages import MappedPages
from lora_adapters.convert.storage.sources import SeveralFilesError, locate
from lora_adapters.types.registry import facts_of_metadata

from . import handing_back, injection, token_embeddings
from . import hotswap as swapping
from .live_names import LiveNames
from .model_state import ModelState

logger = logging.getLogger(__name__)
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


class MissingError(AdapterError, OSError):
    """The adapter does not exist; also an OSError, which diffusers raises in this case."""


class MissingOnHubError(HubError, OSError):
    """The Hub does not have the adapter, or cannot be reached; also an OSError."""


def load(
    pipe: Any,
    source: Any,
    stock: Callable[..., None],
    *,
    adapter_name: str | None = None,
    hotswap: bool = False,
    strict: bool = False,
    **options: Any,
) -> None:
    """Load an adapter into a pipeline. If it fails, the pipeline is unchanged.

    Args:
        pipe: A diffusers pipeline.
        source: A state dict, a file, a folder, a Hub repository, or an `Adapter`.
        stock: The pipeline's own method, for types of adapters that this package does not support.
        adapter_name: The adapter's name; None uses the next default name of diffusers.
        hotswap: Replace the adapter of this name in place.
        strict: Raise an error for modules that the models lack, instead of skipping them with one warning.
        **options: Options of diffusers' `load_lora_weights`.

    Raises:
        AdapterError: The adapter cannot be loaded; the message names the source.
    """
    names = LiveNames(adaptable_models(pipe))
    name, path = "the adapter", None
    if isinstance(source, Mapping):
        name = "the state dict"
    elif not isinstance(source, Adapter):
        path = _located(source, options)
        name = str(path)
    try:
        try:
            adapter = source if isinstance(source, Adapter) else _read(path or source, names)
            pages = None if path is None else _pages(path, adapter)
            _load(pipe, adapter, adapter_name, hotswap, strict, options.get("low_cpu_mem_usage", True), pages)
        except UnknownFormatError as error:
            if isinstance(source, Adapter) or (path is not None and path.is_dir()):
                raise
            if is_known(pipe):
                own = functools.partial(stock, source, adapter_name=adapter_name, hotswap=hotswap, **options)
                handing_back.leave(adaptable_models(pipe), own, error, functools.partial(_contents, path or source))
                return
            _hand_back(pipe, stock, path or source, adapter_name, hotswap, error, options)
    except AdapterError as error:
        said = str(error)
        raise type(error)(said if name in said else f"{name}: {said}") from error.__cause__


def load_adapter(pipe: Any, adapter: Adapter, adapter_name: str | None = None) -> None:
    """Load an `Adapter` into a pipeline; see `load`."""
    try:
        _load(pipe, adapter, adapter_name, hotswap=False, strict=False, low_cpu_mem_usage=True)
    except AdapterError as error:
        raise type(error)(f"the adapter: {error}") from None


def _located(source: Any, options: Mapping[str, Any]) -> Path:
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    try:
        return locate(source, weight_name=options.get("weight_name"), subfolder=options.get("subfolder"), **hub)
    except HubError as error:
        raise MissingOnHubError(error) from error.__cause__
    except SeveralFilesError:
        raise
    except AdapterError as error:
        raise MissingError(error) from error.__cause__


def _read(source: Mapping[str, torch.Tensor] | Path, names: LiveNames) -> Adapter:
    if isinstance(source, Path):
        return Adapter.from_path(source, names, family=names.family)
    return Adapter.from_tensors(dict(source), None, names, family=names.family)


def _pages(path: Path, adapter: Adapter) -> MappedPages:
    """The mapped pages of the file that the adapter was read from; the pages used by reading are released."""
    pages = MappedPages.of(path, adapter.modules.values())
    pages.give_back()
    return pages


def _contents(source: Mapping[str, torch.Tensor] | Path) -> Mapping[str, torch.Tensor]:
    return read_tensors(source)[0] if isinstance(source, Path) else source


def _hand_back(
    pipe: Any,
    stock: Callable[..., None],
    source: Mapping[str, torch.Tensor] | Path,
    adapter_name: str | None,
    hotswap: bool,
    reason: AdapterError,
    options: Mapping[str, Any],
) -> None:
    """Let diffusers load what this package does not support, if it can load all of it; otherwise raise `reason`."""
    tensors, metadata = read_tensors(source) if isinstance(source, Path) else (dict(source), {})
    if hotswap or not may_go_to_diffusers(tensors):
        raise reason
    models, adapter_name = adaptable_models(pipe), adapter_name or default_name(pipe)
    _check_free(models, adapter_name)
    kept: dict[str, Any] = {
        key: value for key, value in options.items() if key not in (*HUB_OPTIONS, "weight_name", "subfolder")
    }
    place: Any = tensors
    if isinstance(source, Path) and METADATA_KEY in metadata:  # diffusers reads the metadata only from a file
        place, kept["weight_name"] = str(source.parent), source.name
    with _without_offloading(pipe):
        load = functools.partial(stock, place, adapter_name=adapter_name, **kept)
        handing_back.load(models, load, adapter_name, tensors, metadata, reason)


def default_name(pipe: Any) -> str:
    """The next unused default name of diffusers, `default_<n>`, unused in every component."""
    used = {name for part in adaptable_models(pipe).values() for name in getattr(part, "peft_config", {})}
    return next(name for name in (f"default_{n}" for n in range(len(used) + 1)) if name not in used)


def adaptable_models(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline that adapters can be injected into, without wrappers.

    These are the models that the pipeline declares, or all its models if it declares none. For a known transformer,
    they also include the text encoders for which adapter files can contain weights (T5).

    Args:
        pipe: A diffusers pipeline.

    Returns:
        The models by component.
    """
    names = getattr(pipe, "_lora_loadable_modules", None)
    family = _family(pipe)
    if names is not None and family is not None:
        names = dict.fromkeys([*names, *(part.name for part in family.components)])
    parts = pipe.components if names is None else {name: getattr(pipe, name, None) for name in names}
    return {name: injection.unwrapped(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def _family(pipe: Any) -> ModelFamily | None:
    return by_class(injection.unwrapped(getattr(pipe, "transformer", None)))


def is_known(pipe: Any) -> bool:
    """Whether the pipeline's transformer belongs to a known family.

    Args:
        pipe: A pipeline of diffusers.

    Returns:
        False for U-Nets and unknown transformers.
    """
    return _family(pipe) is not None


def _list_as_loadable(pipe: Any, components: Iterable[str]) -> None:
    """Make the pipeline's own methods (set_adapters, unload_lora_weights, ...) include these components."""
    listed = getattr(pipe, "_lora_loadable_modules", None)
    if listed is None:
        return
    new = [component for component in components if component not in listed]
    if new:
        pipe._lora_loadable_modules = [*listed, *new]


def _by_component(pipe: Any, adapter: Adapter, strict: bool) -> dict[str, dict[str, Delta]]:
    """The adapter's changes for each component of the pipeline, matched to its model."""
    models = adaptable_models(pipe)
    modules: dict[str, dict[str, Delta]] = {}
    for module, change in adapter.modules.items():
        modules.setdefault(module.component, {})[module.path] = as_pair(change) or change
    for component in [name for name in modules if name not in models]:
        if not hasattr(pipe, component):
            raise AdapterError(f"the adapter changes {component}, which a {type(pipe).__name__} does not have")
        if strict:
            raise AdapterError(f"the adapter changes {component}, which is None in the pipeline")
        logger.warning("The pipeline has no %s loaded: the adapter's part for it is left out.", component)
        del modules[component]
    if not modules:
        raise AdapterError("the adapter changes none of the pipeline's components")
    missing: list[str] = []
    placed = {}
    for component, changes in modules.items():
        try:
            placed[component] = injection.match_to_model(
                models[component], component, changes, None if strict else missing
            )
        except AdapterError as error:  # for some of these models diffusers can make layers wider
            raise UnknownFormatError(str(error)) if is_known(pipe) and not strict else error from None
        if not placed[component]:
            raise AdapterError(
                f"the adapter is for another model: the {component} has none of its {len(changes)} modules, such as "
                f"{missing[-1]:.120}"
            )
    if missing:
        shown = ", ".join([f"{name:.120}" for name in missing[:3]] + (["..."] if len(missing) > 3 else []))
        logger.warning(
            "The model lacks %d of the adapter's %d modules, which are left out (strict=True makes this an error): %s",
            len(missing),
            len(adapter.modules),
            shown,
        )
    return placed


def _check_unwrapped(pipe: Any, components: Iterable[str]) -> None:
    """Raise AdapterError if a component is wrapped for parallel training, since diffusers would not find adapters."""
    for component in components:
        part = getattr(pipe, component)
        if isinstance(part, injection.PARALLEL):
            raise AdapterError(
                f"the {component} is wrapped in a {type(part).__name__}, in which set_adapters and unload_lora_weights "
                f"find no adapters: load with pipe.{component} = pipe.{component}.module"
            )


def _check_free(models: Mapping[str, nn.Module], adapter_name: str) -> None:
    """Raise AdapterError if a component already has an adapter with this name."""
    present = [component for component, model in models.items() if adapter_name in getattr(model, "peft_config", {})]
    if present:
        raise AdapterError(f"the name {adapter_name} is in use in {', '.join(present)}: choose another adapter_name")


def _load(
    pipe: Any,
    adapter: Adapter,
    adapter_name: str | None,
    hotswap: bool,
    strict: bool,
    low_cpu_mem_usage: bool,
    pages: MappedPages | None = None,
) -> None:
    matched = _by_component(pipe, adapter, strict)
    _check_unwrapped(pipe, matched)
    models, facts = adaptable_models(pipe), facts_of_metadata(adapter.metadata)
    adapter_name = adapter_name or default_name(pipe)
    tokens = token_embeddings.planned(pipe, models, adapter.embeddings, adapter_name if hotswap else None)
    if hotswap:
        swapped = _everywhere(models, matched, adapter_name)
        for component, modules in {**matched, **swapped}.items():
            swapping.check(models[component], component, modules, adapter_name)
        for component, modules in swapped.items():
            swapping.swap(models[component], modules, adapter_name, facts)
        token_embeddings.remove(models, [adapter_name])
        token_embeddings.place(pipe, models, tokens, adapter_name)
        return
    _check_free({component: models[component] for component in matched}, adapter_name)
    before = {component: ModelState.of(models[component]) for component in matched}
    with _without_offloading(pipe):
        try:
            for component, modules in matched.items():
                injection.place(models[component], modules, adapter_name, facts, low_cpu_mem_usage, pages)
                if injection.is_text_encoder(component):
                    injection.freeze(models[component], adapter_name)
                swapping.prepare(models[component], adapter_name)
            token_embeddings.place(pipe, models, tokens, adapter_name)
        except BaseException:
            for component, state in before.items():
                state.restore(models[component])
            raise
    _list_as_loadable(pipe, matched)


def _everywhere(
    models: Mapping[str, nn.Module], matched: Mapping[str, dict[str, Delta]], adapter_name: str
) -> dict[str, dict[str, Delta]]:
    """The changes for every component that has the adapter; empty for those that the new adapter does not change."""
    here = [component for component, model in models.items() if adapter_name in getattr(model, "peft_config", {})]
    return {component: dict(matched.get(component, {})) for component in here}


def forgetting(stock: Callable[..., None]) -> Callable[..., None]:
    """Wraps `unload_lora_weights` and `delete_adapters` to remove token embeddings together with their adapters."""

    @functools.wraps(stock)
    def forget(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        names = next(iter([*args, *kwargs.values()]), None) if "adapter" in stock.__name__ else None
        names = [names] if isinstance(names, str) else names
        token_embeddings.remove(adaptable_models(self), names)

    return forget


def inverting(stock: Callable[..., None]) -> Callable[..., None]:
    """Replacement for `load_textual_inversion` and `unload_textual_inversion`, which renumber all tokens."""

    @functools.wraps(stock)
    def invert(self: Any, *args: Any, **kwargs: Any) -> None:
        with token_embeddings.set_aside(adaptable_models(self)):
            stock(self, *args, **kwargs)

    return invert


@contextmanager
def _without_offloading(pipe: Any) -> Iterator[None]:
    """A context in which the pipeline's offloading hooks are removed; they are restored afterwards."""
    offloaded = pipe._optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        _offload_again(pipe, *offloaded)


def _offload_again(pipe: Any, model_offload: bool, sequential_offload: bool, group_offload: bool) -> None:
    if model_offload:
        pipe.enable_model_cpu_offload(device=getattr(pipe, "_offload_device", None))
    elif sequential_offload:
        pipe.enable_sequential_cpu_offload(device=getattr(pipe, "_offload_device", None))
    elif group_offload:
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        for part in adaptable_models(pipe).values():
            _maybe_remove_and_reapply_group_offloading(part)
