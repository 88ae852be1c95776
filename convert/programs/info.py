"""The command info: show what a LoRA file contains."""

import hashlib
import json
import math
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.choices import OTHER
from lora_adapters.convert.deltas.base import Delta, alpha_in
from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.deltas.sum import as_pair
from lora_adapters.convert.deltas.svd import product_norm_squared
from lora_adapters.convert.errors import AdapterError
from lora_adapters.convert.families.detection import titles_of
from lora_adapters.convert.families.registry import denoisers
from lora_adapters.convert.formats import peft, unlisted
from lora_adapters.convert.formats.kinds import split_bundled
from lora_adapters.convert.storage.files import is_safetensors, read_tensors, replacing
from lora_adapters.convert.storage.sources import locate
from lora_adapters.convert.tools.block_weights import block_name
from lora_adapters.convert.tools.command_line import printable
from lora_adapters.convert.tools.inputs import without_unknown, zero_alphas

_TRAINING = (
    "ss_output_name", "ss_sd_model_name", "ss_steps", "ss_max_train_steps", "ss_epoch", "ss_num_epochs",
    "ss_num_train_images", "ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_optimizer", "ss_lr_scheduler",
    "ss_mixed_precision", "ss_seed", "ss_training_comment", "modelspec.merged_from", "modelspec.title",
)  # fmt: skip


_LYCORIS_HASH = "0x"  # the prefix of LyCORIS' hashes; others have no prefix


_NUMBERS = ("alpha", "scalar", "on_input")  # scalar tensors


def _place(block: str) -> tuple[int, str]:
    """The position of a block in tables: text encoders first, then the denoiser from its input to its output."""
    kinds = ("text_encoder", "IN", "", "OUT", *denoisers())  # MID and the blocks of transformers are between IN and OUT
    return next((number for number, kind in enumerate(kinds) if kind and block.startswith(kind)), 2), block


def _ordered_blocks(adapter: Adapter) -> dict[str, list[Delta]]:
    blocks: dict[str, list[Delta]] = {}
    for module, change in adapter.modules.items():
        blocks.setdefault(block_name(module, adapter.architecture), []).append(change)
    return {block: blocks[block] for block in sorted(blocks, key=_place)}


def block_norms(adapter: Adapter) -> dict[str, float]:
    """The Frobenius norm of the change in each block; NaN if a change depends on the model's weights."""
    blocks = _ordered_blocks(adapter)
    return {block: math.sqrt(sum(map(_norm_squared, changes))) for block, changes in blocks.items()}


def _norm_squared(change: Delta) -> float:
    """‖ΔW‖², without the bias."""
    pair = as_pair(change)
    if pair is not None:
        return product_norm_squared(*pair.matrices()) * pair.scale**2
    if not change.changes_weight:
        return 0.0
    return math.nan if change.needs_base else float(change.delta().double().square().sum())


def _kind(adapter: Adapter) -> str:
    kinds = adapter.kinds
    if set(kinds) != {"LoRA"} or adapter.stored:
        return ", ".join(f"{kind} in {count}" for kind, count in kinds.items())
    family = adapter.family
    kind = f"LoRA-{family.adapter_type(adapter.modules).title}" if family.coverage else "LoRA"
    if family.coverage and any(family.part(module) == "outer" for module in adapter.modules):
        kind += " and layers outside of the blocks"
    return f"DyLoRA (unit {adapter.dylora.unit}), as {kind}" if adapter.dylora else kind


def hash_is_right(file: Path, metadata: Mapping[str, str]) -> bool | None:
    """Whether the contents of a file match the SHA-256 in its metadata.

    LyCORIS' hash is not checked, since it depends on the order of the tensors in training, which the file does not
    contain.

    Args:
        file: The file.
        metadata: Its metadata.

    Returns:
        Whether they match; None if the file has no hash, or LyCORIS' hash.
    """
    declared = metadata.get("sshs_model_hash")
    if declared is None or declared.startswith(_LYCORIS_HASH) or not is_safetensors(file):
        return None
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == declared


def _hash_state(path: Path, metadata: Mapping[str, str]) -> str:
    hashed = hash_is_right(path, metadata) if path.is_file() else None
    if hashed is None and metadata.get("sshs_model_hash", "").startswith(_LYCORIS_HASH):
        return "lycoris"
    return {True: "right", False: "wrong", None: "none"}[hashed]


def _count(values: Sequence[Any]) -> dict[str, int]:
    return {f"{value:g}" if isinstance(value, float) else str(value): n for value, n in sorted(Counter(values).items())}


def read(path: Path) -> tuple[Adapter, list[str]]:
    """Read the adapter of a file or PEFT folder, and the names of the file's modules that no known model has."""
    if path.is_dir() or (path.parent / peft.CONFIG).is_file():
        return Adapter.load(path), []
    tensors, metadata = read_tensors(path)
    if not unlisted.is_of_known_model(split_bundled(tensors)[0]):
        return Adapter.load(path, base_model=OTHER), []
    known, unknown = without_unknown(tensors, metadata)
    return (Adapter.load(path), []) if not unknown or not known else (Adapter.from_tensors(known, metadata), unknown)


def facts(adapter: Adapter, path: Path, unknown: Sequence[str] = ()) -> dict[str, Any]:
    """Information about an adapter, for JSON. `unknown` are modules of the file that could not be read."""
    parts = _tensors(adapter)
    norms = block_norms(adapter)
    tensors = read_tensors(path)[0] if path.is_file() else {}
    return {
        "file": str(path),
        "for": titles_of(adapter.modules, adapter.metadata),
        "base": adapter.metadata.get("ss_base_model_version"),
        "type": _kind(adapter),
        "modules": dict(Counter(module.component for module in adapter.modules)),
        "unknown_modules": list(unknown),
        "kinds": adapter.kinds,
        "rank": rank_range(change.rank for change in adapter.modules.values() if change.rank is not None),
        "dtypes": sorted({str(part.dtype).removeprefix("torch.") for part in parts}),
        "parameters": sum(part.numel() for part in parts),
        "zero_alphas": len(zero_alphas(tensors)),  # read as the rank
        "hash": _hash_state(path, adapter.metadata),
        "blocks": [
            {
                "block": block,
                "modules": len(listed),
                "kinds": _count([change.kind for change in listed]),
                "ranks": _count([change.rank for change in listed if change.rank is not None]),
                "alphas": _count([alpha for change in listed if (alpha := alpha_in(change)) is not None]),
                "depends_on_weights": any(change.needs_base and change.changes_weight for change in listed),
                "norm": norms[block] if math.isfinite(norms[block]) else None,
            }
            for block, listed in _ordered_blocks(adapter).items()
        ],
        "training": {key: adapter.metadata[key] for key in _TRAINING if key in adapter.metadata},
    }


def _tensors(adapter: Adapter) -> list[torch.Tensor]:
    """The tensors of all modules, without alphas and scalars."""
    groups = (
        adapter.stored[module].tensors if module in adapter.stored else change.tensors()
        for module, change in adapter.modules.items()
    )
    return [tensor for group in groups for name, tensor in group.items() if name not in _NUMBERS]


def _shown(counts: Mapping[str, int]) -> str:
    if not counts:
        return "-"
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{value} ({n})" for value, n in counts.items())


def as_text(about: Mapping[str, Any]) -> str:
    """Format the facts as a few lines and a table."""
    modules = ", ".join(f"{count} in {component}" for component, count in about["modules"].items())
    hashed = "LyCORIS' own, not of the file's bytes" if about["hash"] == "lycoris" else about["hash"]
    width = max([16, *(len(row["block"]) + 1 for row in about["blocks"])])
    lines = [
        about["file"],
        f"  {about['type']} for {about['for']} ({about['base'] or 'base not stated'}), rank {about['rank']}, {modules}",
        f"  {about['parameters']:,} parameters in {', '.join(about['dtypes'])}; hash: {hashed}",
        f"  {'block':<{width}}{'modules':>8}{'norm':>10}  rank / alpha",
    ]
    for row in about["blocks"]:
        ranks, alphas = _shown(row["ranks"]), _shown(row["alphas"])
        missing = "-" if row["depends_on_weights"] else "none: NaN"
        norm = missing if row["norm"] is None else f"{row['norm']:.4g}"
        kinds = f"  {_shown(row['kinds'])}" if set(about["kinds"]) != {"LoRA"} else ""
        lines.append(f"  {row['block']:<{width}}{row['modules']:>8}{norm:>10}  {ranks} / {alphas}{kinds}")
    if about["unknown_modules"]:
        lines.append(f"  skipped modules, which no known model has: {', '.join(about['unknown_modules'])}")
    if about["zero_alphas"]:
        lines.append(f"  alpha is 0 in {about['zero_alphas']} modules, shown as their rank")
    lines += [f"  {key}: {value}" for key, value in about["training"].items()]
    return "\n".join(printable(line) for line in lines)


def plot(adapters: Mapping[str, Adapter], path: Path) -> None:
    """Plot the norm of the change in each block, with a bar for each adapter that changes the block."""
    try:
        import matplotlib
    except ImportError:
        raise AdapterError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    norms = {name: block_norms(adapter) for name, adapter in adapters.items()}
    blocks = sorted({block for each in norms.values() for block in each}, key=_place)
    stems = [Path(name).stem for name in norms]
    width = 0.8 / len(norms)
    for number, (name, each) in enumerate(norms.items()):
        shift = (number - (len(norms) - 1) / 2) * width
        label = stems[number] if stems.count(stems[number]) == 1 else name
        places = [blocks.index(block) + shift for block in each]
        axes.bar(places, [each[block] for block in each], width, label=label)
    axes.set_xticks(range(len(blocks)), blocks, rotation=90)
    axes.set_ylabel("norm of the change")
    axes.legend()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)


def info(args: Namespace) -> None:
    """Run `lora-adapters info`.

    Args:
        args: The options of the script's parser.

    Raises:
        UsageError: The options contradict each other.
        AdapterError: A file cannot be read.
    """
    places = {model: locate(model) for model in args.models}
    loaded = {model: read(path) for model, path in places.items()}
    adapters = {model: adapter for model, (adapter, _) in loaded.items()}
    listed = [facts(adapter, places[model], unknown) for model, (adapter, unknown) in loaded.items()]
    if args.plot:
        plot(adapters, Path(args.plot).expanduser())
    print(json.dumps(listed, indent=2) if args.json else "\n\n".join(map(as_text, listed)))
