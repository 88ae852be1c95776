"""The command merge: merge LoRAs into a model, or several LoRAs into one."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.combined import Combination
from lora_adapters.convert.deltas.reduction import reduce_modules
from lora_adapters.convert.deltas.svd import as_written, report, rules, with_rank_facts
from lora_adapters.convert.errors import AdapterError, UsageError
from lora_adapters.convert.families.family import ModelFamily
from lora_adapters.convert.families.registry import is_v2
from lora_adapters.convert.formats.metadata import MERGED_FACTS, merged_facts
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.storage.ema import ema_keys
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.block_weights import parse, weighted
from lora_adapters.convert.tools.combining import combination_of, put_together
from lora_adapters.convert.tools.command_line import dtype_of, output_file, report_left_out
from lora_adapters.convert.tools.inputs import load, weights_alone
from lora_adapters.convert.tools.merge import fitting, merge_into_model, weighted_sum
from lora_adapters.convert.tools.model_arguments import read_arguments
from lora_adapters.convert.tools.summary import written

MODEL_FACTS = ("modelspec.merged_from", "modelspec.trigger_phrase")  # entries copied to a merged checkpoint's header


def load_all(
    models: Sequence[str],
    ratios: Sequence[float] | None,
    lbws: Sequence[str] | None,
    skip_unknown: bool = False,
    base_model: str | None = None,
) -> tuple[dict[str, Adapter], list[float]]:
    """Load the adapters of a command line.

    Args:
        models: Paths, optionally followed by a weight and block weights; see `model_arguments`.
        ratios: A weight for each; None uses the weights after the paths, or 1.
        lbws: Block weights for each; None uses those after the paths, if any.
        skip_unknown: Leave out modules that no known model has.
        base_model: The family of the base model; None recognises it from each file.

    Returns:
        The adapters by name, scaled by their block weights; and the ratios.

    Raises:
        UsageError: The number of ratios or block weights is not that of models, or a weight is given twice.
        AdapterError: A file cannot be read.
    """
    arguments = read_arguments(models)
    for what, listed in (("ratios", ratios), ("lbws", lbws)):
        if listed is not None and len(listed) != len(arguments):
            raise UsageError(f"{len(arguments)} models, but {len(listed)} {what}: give one for each model")
    adapters: dict[str, Adapter] = {}
    weights: list[float] = []
    for place, argument in enumerate(arguments):
        if ratios is not None and argument.unet is not None:
            raise UsageError(f"{argument.source} has a weight both after the path and in --ratios: give only one")
        if lbws is not None and argument.blocks is not None:
            raise UsageError(f"{argument.source} has block weights both after the path and in --lbws: give only one")
        adapter, ratio = argument.applied(load(argument.source, None, skip_unknown, base_model))
        if lbws is not None:
            adapter = weighted(adapter, parse(lbws[place]))
        adapters[argument.source if argument.source not in adapters else f"{argument.source} ({place + 1})"] = adapter
        weights.append(ratio if ratios is None else ratios[place])
    return adapters, weights


def merged_metadata(merged: Adapter, adapters: Mapping[str, Adapter], no_metadata: bool) -> dict[str, str]:
    """The metadata of a sum: its own, and those of its sources with their names unless no_metadata is set."""
    if no_metadata:
        return {key: text for key, text in merged.metadata.items() if key not in MERGED_FACTS}
    return {**merged.metadata, **merged_facts([adapter.metadata for adapter in adapters.values()], _sources(adapters))}


def _sources(adapters: Mapping[str, Adapter]) -> list[str]:
    """The sources of the adapters of `load_all`, without the number that is added to duplicates."""
    plain = [name.rpartition(" (")[0] for name in adapters]
    return [short if short in adapters else name for name, short in zip(adapters, plain, strict=True)]


def merge(args: Namespace) -> None:
    """Run `lora-adapters merge`.

    Args:
        args: The options of the script's parser.

    Raises:
        UsageError: The options contradict each other.
        AdapterError: A file cannot be read, or does not fit.
    """
    dtype, how = dtype_of(args.save_precision, args.precision), combination_of(args)
    if args.sd_model is None:
        _into_one(args, dtype, how)
        return
    for flag in ("new_rank", "new_conv_rank", "concat", "shuffle"):
        if getattr(args, flag) not in (None, False):
            raise UsageError(f"--{flag} is for merging LoRAs into one: remove --sd_model")
    checkpoint = Checkpoint.open(args.sd_model)
    if not checkpoint.is_folder:
        output_file(args.save_to)
    if args.v2 and not is_v2(checkpoint.base_version):
        raise AdapterError(f"{args.sd_model} is {checkpoint.base_version}, but --v2 requires SD2.x")
    adapters, ratios = load_all(args.models, args.ratios, args.lbws, args.skip_unknown, args.base_model)
    if args.skip_unknown:
        adapters = _fitting(checkpoint, adapters)
    facts = merged_facts([adapter.metadata for adapter in adapters.values()], [args.sd_model, *_sources(adapters)])
    count = len(adapters)
    if how is not None:
        adapters, ratios = {" and ".join(adapters): put_together(adapters, ratios, how)}, [1.0]
    path = merge_into_model(
        checkpoint,
        args.save_to,
        [*adapters.values()],
        ratios,
        [*adapters],
        dtype,
        {key: facts[key] for key in MODEL_FACTS if key in facts},
        not args.no_metadata,
        args.ema,
    )
    _report_ema(checkpoint, args.ema)
    form = " (one file in the original layout)" if checkpoint.is_folder and path.is_file() else ""
    say(f"merged {count} into {args.sd_model}: {path}{form}")
    say(_how_to_load(path, facts.get("modelspec.trigger_phrase"), checkpoint.family))


def _how_to_load(path: Path, words: str | None, family: ModelFamily) -> str:
    """How to load a merged model, as text."""
    lines = [f"  trigger words: {words}"] if words else []
    if path.is_dir():
        lines.append(f'  to load it: DiffusionPipeline.from_pretrained("{path}")')
    elif family.single_file:
        lines.append(f'  to load it in diffusers: {family.single_file}.from_single_file("{path}")')
    if path.is_file():
        lines.append("  in A1111: the file in models/Stable-diffusion; in ComfyUI: models/checkpoints")
    return "\n".join(lines)


def _fitting(checkpoint: Checkpoint, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters without the modules that the model does not have, which are listed."""
    fitted = {}
    for name, adapter in adapters.items():
        fitted[name], missing = fitting(checkpoint, adapter, name)
        report_left_out(name, map(str, missing), f"{checkpoint.path} does not have")
    return fitted


def _report_ema(checkpoint: Checkpoint, chosen: str) -> None:
    """Report what happened to a checkpoint's averaged weights, which some programs use to generate images."""
    count = len(ema_keys(checkpoint))
    if count:
        done = {"keep": "kept as they were (--ema merge or --ema drop)", "drop": "left out", "merge": "merged too"}
        say(f"{count} EMA tensors (model_ema.*): {done[chosen]}")


def _into_one(args: Namespace, dtype: torch.dtype | None, how: Combination | None) -> None:
    path = output_file(args.save_to)
    if args.v2 or (args.new_conv_rank is not None and args.new_rank is None):
        raise UsageError("--v2 requires --sd_model, --new_conv_rank requires --new_rank")
    if args.concat and args.new_rank is not None:
        raise UsageError("--concat keeps all ranks, --new_rank reduces them: give only one")
    if how is not None and args.new_rank is None:
        raise UsageError(f"--method {args.method} gives changes of full rank: give --new_rank (or --sd_model)")
    if args.ema != "keep":
        raise UsageError("--ema requires --sd_model: LoRAs have no averaged weights")
    adapters, ratios = load_all(args.models, args.ratios, args.lbws, args.skip_unknown, args.base_model)
    if args.new_rank is None:
        merged = weighted_sum(adapters, ratios).to(dtype or torch.float32)
    else:
        merged = put_together({name: weights_alone(adapter, name) for name, adapter in adapters.items()}, ratios, how)
        exact, fits = reduce_modules(merged.modules, rules(args.new_rank, args.new_conv_rank))
        merged = merged.with_modules(exact).to(dtype or torch.float32)
        say(report(as_written(fits, exact, merged.pairs()), "a higher --new_rank"))
    if args.shuffle:
        pairs = merged.pairs()
        merged = merged.with_modules({name: pair.reordered(torch.randperm(pair.rank)) for name, pair in pairs.items()})
    metadata = with_rank_facts(merged.modules, merged_metadata(merged, adapters, args.no_metadata))
    result = Adapter(merged.modules, metadata)
    result.save(path, modelspec=not args.no_metadata)
    say(written(path, result))
