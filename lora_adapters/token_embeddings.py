"""Token embeddings (textual inversions) in adapter files, loaded into a live pipeline.

They are added to the tokenizers and text encoders together with the adapter, with the names that
`diffusers.loaders.TextualInversionLoaderMixin` uses: a token with several vectors becomes `token token_1 token_2 ...`,
which a pipeline substitutes for `token` in prompts. The weights of the text encoders do not change: hooks look up the
vectors of the new ids. Tokens and vectors are removed together with the adapter.
"""

import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_adapters.convert.errors import AdapterError

logger = logging.getLogger(__name__)
_STATE = "_lora_adapters_tokens"  # the attribute of a text encoder with such embeddings
_ENDS = {  # the suffixes of keys, and the text encoder of the embedding
    "string_to_param.*": "text_encoder",  # A1111
    "emb_params": "text_encoder",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}


class Embedding(NamedTuple):
    """One token for one text encoder: its key without `bundle_emb.`, its names, and their vectors (count, width)."""

    key: str
    tokens: tuple[str, ...]
    vectors: torch.Tensor


class _Lookup:
    """Hooks of an embedding layer that supply the vectors of ids after the tokenizer's own ids."""

    def __init__(self) -> None:
        self.first, self.vectors = 0, torch.empty(0)
        self._ids = torch.empty(0)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before forward: replace the ids of new tokens by an id that the layer has."""
        self._ids = args[0]
        return (self._ids.where(self._ids < self.first, 0), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """After forward: insert the vectors of new tokens into the output, (..., width)."""
        ids = self._ids.to(output.device)
        is_new = (ids >= self.first)[..., None]
        vectors = self.vectors.to(output)[(ids - self.first).clamp(min=0)]
        return torch.where(is_new, vectors, output)


@dataclass
class _State:
    """The embeddings in a text encoder by adapter, and the tokenizer without them."""

    tokenizer: Any
    before: Any  # a copy of the tokenizer
    legacy: list[nn.Module]  # modules that treat the highest id as the end of a text
    by_adapter: dict[str, list[Embedding]] = field(default_factory=dict)
    lookup: _Lookup = field(default_factory=_Lookup)

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """The vector of each token that the adapters add to the vocabulary, in the order of the ids."""
        own = self.before.get_vocab()
        parts = [part for listed in self.by_adapter.values() for part in listed]
        pairs = [pair for part in parts for pair in zip(part.tokens, part.vectors, strict=True)]
        return {token: vector for token, vector in pairs if token not in own}


Plan = dict[str, list[Embedding]]


def planned(
    pipe: Any, models: Mapping[str, nn.Module], embeddings: Mapping[str, torch.Tensor], replaced: str | None = None
) -> Plan:
    """Plan the text encoder of each embedding of a file. Nothing is changed.

    Args:
        pipe: The pipeline.
        models: Its models by component, without wrappers.
        embeddings: Tensors by key without `bundle_emb.`, `<token>.<...>`. A warning lists those for which the pipeline
            has no text encoder.
        replaced: An adapter whose embeddings will be removed.

    Returns:
        The embeddings by component.

    Raises:
        AdapterError: The width does not match the text encoder, or the token already has another embedding.
    """
    plan: Plan = {}
    left_out = []
    for key, tensor in embeddings.items():
        token, component = _split(key)
        tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"), None) if component else None
        model = models.get(component)
        if tokenizer is None or model is None or not hasattr(pipe, "maybe_convert_prompt") or tensor.ndim not in (1, 2):
            left_out.append(key)
            continue
        embedding = _named(key, token, tensor)
        _check(embedding, component, tokenizer, model, replaced)
        if any(other.tokens[0] == token for other in plan.get(component, [])):
            raise AdapterError(f"bundle_emb.{key:.80} and another key stand for the same token of the {component}")
        plan.setdefault(component, []).append(embedding)
    if left_out:
        logger.warning(
            "The pipeline has no text encoder for embeddings of the adapter, which are left out: %s",
            ", ".join(left_out),
        )
    return plan


def _split(key: str) -> tuple[str, str]:
    """The token in a key, and its text encoder ("" if unknown)."""
    for end, component in _ENDS.items():
        if key.endswith(f".{end}"):
            return key.removesuffix(f".{end}"), component
    token, _, rest = key.partition(".")
    return token, "text_encoder" if rest.strip("<>") == token.strip("<>") else ""  # diffusers uses the token's name


def _named(key: str, token: str, tensor: torch.Tensor) -> Embedding:
    vectors = tensor.reshape(-1, tensor.shape[-1])
    return Embedding(key, (token, *(f"{token}_{number}" for number in range(1, len(vectors)))), vectors)


def _check(embedding: Embedding, component: str, tokenizer: Any, model: Any, replaced: str | None) -> None:
    """Raise AdapterError if the embedding cannot be added to the text encoder."""
    weight = model.get_input_embeddings().weight
    if embedding.vectors.shape[1:] != weight.shape[1:] or not len(embedding.vectors):
        raise AdapterError(
            f"bundle_emb.{embedding.key:.80} has the shape {list(embedding.vectors.shape)}, "
            f"but the {component}'s embeddings are {weight.shape[1]} wide"
        )
    state: _State | None = getattr(model, _STATE, None)
    others = {name: parts for name, parts in state.by_adapter.items() if name != replaced} if state is not None else {}
    new = {token: vector for parts in others.values() for part in parts for token, vector in _pairs(part)}
    vocabulary = (tokenizer if state is None else state.before).get_vocab()
    for token, vector in _pairs(embedding):
        present = new.get(token) if token in new else weight[vocabulary[token]] if token in vocabulary else vector
        if present is None or present.is_meta or not _are_equal(present, vector, weight.dtype):
            raise AdapterError(
                f"the tokenizer already has the token {token:.80} with another embedding: remove that one first, "
                "or load Adapter.load(path).replaced(embeddings={})"
            )


def _are_equal(vector: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(vector.to("cpu", dtype), other.to("cpu", dtype))


def _pairs(embedding: Embedding) -> list[tuple[str, torch.Tensor]]:
    return list(zip(embedding.tokens, embedding.vectors, strict=True))


def place(pipe: Any, models: Mapping[str, nn.Module], plan: Plan, adapter_name: str) -> None:
    """Add embeddings to tokenizers and text encoders, all of them or none."""
    try:
        for component, parts in plan.items():
            tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
            _place(tokenizer, models[component], parts, adapter_name)
    except BaseException:
        remove(models, [adapter_name])
        raise


def _place(tokenizer: Any, model: Any, parts: list[Embedding], adapter_name: str) -> None:
    state: _State | None = getattr(model, _STATE, None)
    if state is None:
        state = _State(tokenizer, copy.deepcopy(tokenizer), _legacy(model, tokenizer))
        setattr(model, _STATE, state)
        layer = model.get_input_embeddings()
        layer.register_forward_pre_hook(state.lookup.before)
        layer.register_forward_hook(state.lookup.after)
    state.by_adapter[adapter_name] = parts
    _settle(state)


def _settle(state: _State) -> None:
    """Add the tokens of all adapters to the tokenizer, after its own, and their vectors to the lookup."""
    tokenizer, vectors = state.tokenizer, state.vectors
    own = vars(copy.deepcopy(state.before))
    vars(tokenizer).clear()  # modified in place, since other pipelines may share the object
    vars(tokenizer).update(own)
    state.lookup.first = len(tokenizer)
    for token in vectors:
        tokenizer.add_tokens(token)
    if vectors:
        state.lookup.vectors = torch.stack(list(vectors.values()))


def _legacy(model: Any, tokenizer: Any) -> list[nn.Module]:
    """CLIP's modules that find the end of a text by the highest id, as for configs with the wrong end token (2).

    They would mistake a new token, which has a higher id, for the end. So they use the correct end token while there
    are new tokens.
    """
    parts = [part for part in model.modules() if getattr(part, "eos_token_id", None) == 2]
    for part in parts:
        part.eos_token_id = tokenizer.eos_token_id
    return parts


def _states(models: Mapping[str, nn.Module]) -> Iterator[tuple[Any, _State]]:
    for model in models.values():
        if hasattr(model, _STATE):
            yield model, getattr(model, _STATE)


def remove(models: Mapping[str, nn.Module], adapter_names: Collection[str] | None) -> None:
    """Remove the embeddings of adapters; None for those of all adapters."""
    for model, state in list(_states(models)):
        before = len(state.by_adapter)
        for name in list(state.by_adapter):
            if adapter_names is None or name in adapter_names:
                del state.by_adapter[name]
        if len(state.by_adapter) < before:
            _settle(state)
        if not state.by_adapter:
            for part in state.legacy:
                part.eos_token_id = 2  # type: ignore[assignment]
            layer = model.get_input_embeddings()
            for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Lookup)]:
                    del hooks[key]
            delattr(model, _STATE)


@contextmanager
def set_aside(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """A context without the adapters' embeddings; afterwards they are added again, after the tokens present then."""
    states = list(_states(models))
    by_adapter = [dict(state.by_adapter) for _, state in states]
    remove(models, None)
    try:
        yield
    finally:
        for (model, state), parts in zip(states, by_adapter, strict=True):
            for name, listed in parts.items():
                _place(state.tokenizer, model, listed, name)


def embeddings_of(models: Mapping[str, nn.Module], adapter_name: str) -> dict[str, torch.Tensor]:
    """The embeddings of an adapter in the models, by key without `bundle_emb.`."""
    return {part.key: part.vectors for _, state in _states(models) for part in state.by_adapter.get(adapter_name, ())}
