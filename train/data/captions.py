"""Applies caption options (dropout, shuffling, wildcards, ...) to an image's caption each time it is used."""

import math
import random
import re
from dataclasses import dataclass

from lora_adapters.train.data.config import SubsetConfig

WILDCARD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Moment:
    """The time at which a caption is drawn: epoch and optimizer step, both from 0, and the run's number of steps."""

    epoch: int = 0
    step: int = 0
    max_train_steps: int = 0


def varying_options(subset: SubsetConfig) -> list[str]:
    """The options of `subset` that vary captions over time, and therefore cannot be combined with text caches."""
    names = (
        "shuffle_caption", "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate",
        "token_warmup_step", "enable_wildcard",
    )  # fmt: skip
    return [name for name in names if getattr(subset, name)]


def draw_caption(caption: str, subset: SubsetConfig, rng: random.Random, moment: Moment) -> str:
    """Apply the caption options of a subset.

    The order is: prefix and suffix (joined by a space), dropout of the whole caption, wildcards or the first line, tag
    warm-up, shuffling and dropout of tags except those to keep, joining by the separator and a space, replacement of
    the secondary separator by the separator.

    Args:
        caption: The caption of the image, which may have several lines.
        subset: The options.
        rng: The only source of randomness.
        moment: The step and epoch, for warm-up and for dropout of whole epochs.

    Returns:
        The caption to train with.
    """
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    if _dropped(subset, rng, moment):
        return ""
    caption = _expand(caption, rng) if subset.enable_wildcard else caption.split("\n")[0]
    caption = _arrange(caption, subset, rng, moment)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def _dropped(subset: SubsetConfig, rng: random.Random, moment: Moment) -> bool:
    every = subset.caption_dropout_every_n_epochs
    by_chance = subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate
    return by_chance or (every > 0 and (moment.epoch + 1) % every == 0)


def _expand(caption: str, rng: random.Random) -> str:
    """Choose one line, then one alternative of each {a|b}; {{ and }} are literal braces."""
    caption = rng.choice(caption.split("\n"))
    parts = re.split(r"(\{\{|\}\})", caption)
    # Placeholders for escaped braces: characters that captions do not contain and the pattern does not match.
    hidden = "".join({"{{": "\0", "}}": "\1"}.get(part, part) for part in parts)
    chosen = WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), hidden)
    return chosen.replace("\0", "{").replace("\1", "}")


def _arrange(caption: str, subset: SubsetConfig, rng: random.Random, moment: Moment) -> str:
    """Apply warm-up, shuffling and dropout to tags, except those to keep. Without these options nothing changes."""
    changes = subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0
    separator = subset.keep_tokens_separator or ""
    separated = separator != "" and separator in caption
    if not changes and not separated:
        return caption
    tail: list[str] = []
    if separated:
        head_text, _, rest = caption.partition(separator)
        flexible_text, _, tail_text = rest.partition(separator)
        head, flexible, tail = (_tags(text, subset) for text in (head_text, flexible_text, tail_text))
    else:
        tags = _tags(caption, subset)
        head, flexible = tags[: subset.keep_tokens], tags[subset.keep_tokens :]
    flexible = flexible[: _warmed_up(len(flexible), subset, moment)]
    if subset.shuffle_caption:
        rng.shuffle(flexible)
    if subset.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= subset.caption_tag_dropout_rate]
    space = "" if subset.caption_separator[-1].isspace() else " "
    return f"{subset.caption_separator}{space}".join(head + flexible + tail)


def _tags(text: str, subset: SubsetConfig) -> list[str]:
    return [tag.strip() for tag in text.split(subset.caption_separator) if tag.strip()]


def _warmed_up(count: int, subset: SubsetConfig, moment: Moment) -> int:
    """The number of tags to use at this step: from token_warmup_min at step 0 to all at token_warmup_step."""
    steps = subset.token_warmup_step
    if 0 < steps < 1:
        steps = math.floor(steps * moment.max_train_steps)
    if steps == 0 or moment.step >= steps or count <= subset.token_warmup_min:
        return count
    return math.floor(moment.step * (count - subset.token_warmup_min) / steps) + subset.token_warmup_min
