"""Embeddings of tokens (textual inversions) that an adapter's file has beside its changes, in a live pipeline.

They go into the tokenizers and text encoders with the adapter, under the names that
`diffusers.loaders.TextualInversionLoaderMixin` gives them: a token of several vectors is `token token_1 token_2 ...`,
which a pipeline makes of `token` in prompts. They leave with the adapter: then the vocabularies and the embeddings of
the text encoders are what they would be without it.
"""

import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_adapters.convert.errors import AdapterError

logger = logging.getLogger(__name__)
_STATE = "_lora_adapters_tokens"  # the attribute of a text encoder that has such embeddings
_ENDS = {  # of keys, and the text encoder whose embeddings they are
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


@dataclass
class _State:
    """The embeddings in a text encoder: whose they are, and what vocabulary and weights were without them."""

    tokenizer: Any
    before: Any  # a copy of the tokenizer
    tail: torch.Tensor  # rows that the tokens' ids had already
    legacy: list[nn.Module]  # modules that take the highest id for the end of a text
    by_adapter: dict[str, list[Embedding]] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)

    @property
    def held(self) -> set[str]:
        """The tokens that an adapter needs."""
        return {token for parts in self.by_adapter.values() for part in parts for token in part.tokens}


Plan = dict[str, list[Embedding]]


def planned(
    pipe: Any, models: Mapping[str, nn.Module], embeddings: Mapping[str, torch.Tensor], replaced: str | None = None
) -> Plan:
    """The embeddings of a file by the text encoders that they go into; nothing is changed.

    Args:
        pipe: The pipeline.
        models: Its models by component, without wrappers.
        embeddings: By the ends of their keys, `<token>.<...>`. A warning names those without a place in it.
        replaced: An adapter whose own embeddings will be gone.

    Raises:
        AdapterError: One is of another width, or its token has another embedding already.
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
        one = _named(key, token, tensor)
        _check(one, component, tokenizer, model, replaced)
        if any(other.tokens[0] == token for other in plan.get(component, [])):
            raise AdapterError(f"bundle_emb.{key:.80} and another key stand for the same token of the {component}")
        plan.setdefault(component, []).append(one)
    if left_out:
        logger.warning(
            "The pipeline has no place for embeddings beside the adapter, which are left out: %s", ", ".join(left_out)
        )
    return plan


def _split(key: str) -> tuple[str, str]:
    """The token in a key and the text encoder that it is for, "" where nobody knows."""
    for end, component in _ENDS.items():
        if key.endswith(f".{end}"):
            return key.removesuffix(f".{end}"), component
    token, _, rest = key.partition(".")
    return token, "text_encoder" if rest.strip("<>") == token.strip("<>") else ""  # diffusers: named like the token


def _named(key: str, token: str, tensor: torch.Tensor) -> Embedding:
    vectors = tensor.reshape(-1, tensor.shape[-1])
    return Embedding(key, (token, *(f"{token}_{number}" for number in range(1, len(vectors)))), vectors)


def _check(one: Embedding, component: str, tokenizer: Any, model: Any, replaced: str | None) -> None:
    """AdapterError where the embedding cannot be put there."""
    weight = model.get_input_embeddings().weight
    if one.vectors.shape[1:] != weight.shape[1:] or not len(one.vectors):
        raise AdapterError(
            f"bundle_emb.{one.key:.80} has the shape {list(one.vectors.shape)}, but the {component}'s embeddings are "
            f"{weight.shape[1]} wide"
        )
    state: _State | None = getattr(model, _STATE, None)
    others = state.by_adapter if state is not None else {}
    held = {token for name, parts in others.items() if name != replaced for part in parts for token in part.tokens}
    vocabulary = tokenizer.get_vocab()
    for token, vector in zip(one.tokens, one.vectors, strict=True):
        if token not in vocabulary or (state is not None and token in state.added - held):
            continue
        found = weight[vocabulary[token]]
        if found.is_meta or not torch.equal(found, vector.to(found)):
            raise AdapterError(
                f"the tokenizer has the token {token:.80} already, with another embedding: take that one out first, "
                "or load Adapter.load(path).replaced(embeddings={})"
            )


def place(pipe: Any, models: Mapping[str, nn.Module], plan: Plan, adapter_name: str) -> None:
    """Put embeddings into tokenizers and text encoders, all of them or none."""
    try:
        for component, parts in plan.items():
            tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
            _place(tokenizer, models[component], parts, adapter_name)
    except BaseException:
        remove(models, [adapter_name])
        raise


@torch.no_grad()
def _place(tokenizer: Any, model: Any, parts: list[Embedding], adapter_name: str) -> None:
    state: _State | None = getattr(model, _STATE, None)
    if state is None:
        tail = model.get_input_embeddings().weight[len(tokenizer) :].clone()
        state = _State(tokenizer, copy.deepcopy(tokenizer), tail, _legacy(model, tokenizer))
        setattr(model, _STATE, state)
    state.by_adapter[adapter_name] = parts
    new = {}
    for part in parts:
        new |= dict(zip(part.tokens, part.vectors, strict=True))
    for token in list(new):
        if token in tokenizer.get_vocab():  # another adapter's, or a user's: the same vector
            del new[token]
            continue
        state.added.add(token)
        tokenizer.add_tokens(token)
    _put(model, tokenizer, new)


def _legacy(model: Any, tokenizer: Any) -> list[nn.Module]:
    """The modules of CLIP that look for the end of a text at the highest id, as configs with the wrong one (2) say.

    With ids above the end's they would take a new token for it. They look for the end itself while there are such.
    """
    found = [part for part in model.modules() if getattr(part, "eos_token_id", None) == 2]
    for part in found:
        part.eos_token_id = tokenizer.eos_token_id
    return found


def _put(model: Any, tokenizer: Any, rows: Mapping[str, torch.Tensor]) -> None:
    """Write the embeddings of tokens, behind the rows that there are where their ids are higher."""
    weight = model.get_input_embeddings().weight
    ids = [tokenizer.convert_tokens_to_ids(token) for token in rows]
    more = max([*ids, len(weight) - 1]) + 1 - len(weight)
    total = torch.cat([weight, weight.new_zeros(more, weight.shape[1])]) if more else weight.clone()
    for number, vector in zip(ids, rows.values(), strict=True):
        total[number] = vector.to(total)
    _replace(model, total)


def _replace(model: Any, weight: torch.Tensor) -> None:
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(weight, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = model.config.vocab_size = len(weight)


def has_any(models: Mapping[str, nn.Module], adapter_names: Collection[str] | None) -> bool:
    """Whether adapters of these names, or any where None, have embeddings in the models."""
    return any(
        adapter_names is None or any(name in adapter_names for name in state.by_adapter) for _, state in _states(models)
    )


def _states(models: Mapping[str, nn.Module]) -> Iterator[tuple[Any, _State]]:
    for model in models.values():
        if hasattr(model, _STATE):
            yield model, getattr(model, _STATE)


@torch.no_grad()
def remove(models: Mapping[str, nn.Module], adapter_names: Collection[str] | None) -> None:
    """Take the embeddings of adapters out, those of all where None.

    Embeddings that came otherwise stay; their ids move up into the place of those that are gone.
    """
    for model, state in list(_states(models)):
        for name in list(state.by_adapter):
            if adapter_names is None or name in adapter_names:
                del state.by_adapter[name]
        gone = state.added - state.held
        if gone:
            _take_out(model, state, gone)
            state.added -= gone
        if not state.by_adapter:
            for part in state.legacy:
                part.eos_token_id = 2  # type: ignore[assignment]
            delattr(model, _STATE)


def _take_out(model: Any, state: _State, gone: set[str]) -> None:
    tokenizer, before = state.tokenizer, len(state.before)
    weight = model.get_input_embeddings().weight
    known = set(state.before.added_tokens_encoder)
    kept = [
        (token, weight[number].clone())
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.content not in gone and token.content not in known
    ]
    own = vars(copy.deepcopy(state.before))
    vars(tokenizer).clear()  # the object itself stays: other pipelines may have it, too
    vars(tokenizer).update(own)
    for token, _ in kept:
        tokenizer.add_tokens(token)
    _replace(model, torch.cat([weight[:before], state.tail.to(weight)]))
    if kept:
        _put(model, tokenizer, {token.content: row for token, row in kept})


def embeddings_of(models: Mapping[str, nn.Module], adapter_name: str) -> dict[str, torch.Tensor]:
    """The embeddings of an adapter in the models, by the ends of their keys in a file."""
    return {part.key: part.vectors for _, state in _states(models) for part in state.by_adapter.get(adapter_name, ())}
