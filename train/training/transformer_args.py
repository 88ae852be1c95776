"""Translates kohya's network_args for transformers (ranks of layer kinds, trained blocks) into ranks by pattern.

The family defines the patterns of each option (`TrainingFamily.rank_args`, `block_args`).
"""

from collections.abc import Mapping

from lora_adapters.convert.errors import AdapterError
from lora_adapters.train.models.family import TrainingFamily

_BLOCKS = 64  # more blocks than any transformer has
_OUTSIDE = ("in_dims", "emb_dims")
_TRUE = ("true", "1")


def translated(args: Mapping[str, str], family: TrainingFamily) -> dict[str, str]:
    """Translate kohya's network_args of transformers into regular expressions with ranks (network_reg_dims).

    The user's own patterns have priority, then the blocks that are not trained, then the ranks of layer kinds.

    Args:
        args: The network_args.
        family: The family of the base model; nothing is translated if it has no such arguments.

    Returns:
        The network_args, with those for transformers moved into network_reg_dims.

    Raises:
        AdapterError: A value is invalid, or an argument is for layers outside of the blocks.
    """
    rest, patterns = dict(args), list[str]()
    if not family.rank_args:
        return rest
    for name in _OUTSIDE:
        if name in rest:
            raise AdapterError(f"network_args {name}: layers outside of the blocks are not trained; leave it out")
    if "train_blocks" in rest:
        rest |= _stacks(rest.pop("train_blocks"), family)
    rest.pop("train_t5xxl", None)  # see `trains_frozen_text`
    rest.pop("split_qkv", None)  # q, k and v are separate modules in diffusers' models anyway
    for name, stack in family.block_args.items():
        if name in rest:
            patterns += _left_out(name, rest.pop(name), stack)
    for name, pattern in family.rank_args.items():
        if name in rest:
            patterns.append(f"{pattern}={_rank(name, rest.pop(name))}")
    if patterns:
        own = [rest["network_reg_dims"]] if rest.get("network_reg_dims") else []
        rest["network_reg_dims"] = ",".join(own + patterns)
    return rest


def trains_frozen_text(args: Mapping[str, str]) -> bool:
    """Whether text encoders that are frozen by default are trained (train_t5xxl)."""
    return str(args.get("train_t5xxl", "")).lower() in _TRUE


def _rank(name: str, text: str) -> int:
    try:
        rank = int(text)
    except ValueError:
        rank = -1
    if rank < 0:
        raise AdapterError(f"network_args {name}={text}: it takes a rank, or 0 to leave these layers out")
    return rank


def _stacks(text: str, family: TrainingFamily) -> dict[str, str]:
    """Translate train_blocks=single or double: no blocks of the other stack are trained."""
    kinds = {name.split("_")[1]: name for name in family.block_args}
    if text != "all" and (len(kinds) < 2 or text not in kinds):
        raise AdapterError(f"network_args train_blocks={text}: it takes {', '.join(['all', *kinds])}")
    return {} if text == "all" else {name: "none" for kind, name in kinds.items() if kind != text}


def _left_out(name: str, text: str, stack: str) -> list[str]:
    """The pattern, with rank 0, for all blocks that are not in a selection such as "0,3-5"."""
    if text == "all":
        return []
    chosen: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")) if text != "none" else ():
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) >= _BLOCKS:
            raise AdapterError(f"network_args {name}={text}: it takes block numbers such as 0,3-5, or all, or none")
        chosen |= set(range(int(first), int(last or first) + 1))
    kept = f"(?!(?:{'|'.join(map(str, sorted(chosen)))})\\.)" if chosen else ""
    return [rf"{stack}\.{kept}.*=0"]
