"""The command convert: convert an adapter to another format."""

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.choices import FORMATS, OTHER
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.convert.deltas.reduction import reduce_modules
from lora_adapters.convert.deltas.sum import as_pair
from lora_adapters.convert.deltas.svd import report, rules, with_rank_facts
from lora_adapters.convert.errors import AdapterError, UsageError
from lora_adapters.convert.families.names import ModuleName
from lora_adapters.convert.formats import cloneofsimo
from lora_adapters.convert.storage.files import all_or_none, read_tensors, replacing
from lora_adapters.convert.storage.sources import locate
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.base_weights import BaseWeights
from lora_adapters.convert.tools.command_line import dtype_of, output_file
from lora_adapters.convert.tools.inputs import load, weights_alone
from lora_adapters.convert.tools.summary import written


def save_embeddings(embeddings: dict[str, torch.Tensor], folder: Path, stem: str) -> list[str]:
    """Write each token's embedding to a separate file in the folder; the file names begin with the stem."""
    written: list[str] = []
    for token, tensor in embeddings.items():
        word = re.sub(r"[^\w-]+", "_", token).strip("_") or "token"
        name = f"{stem}.{word}.safetensors"
        name = name if name not in written else f"{stem}.{word}-{len(written)}.safetensors"
        with replacing(folder / name) as partial:
            safetensors.torch.save_file({token: tensor.contiguous()}, partial)
        written.append(name)
    return written


def read_embeddings(files: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read embeddings from files, each of which contains one token."""
    embeddings: dict[str, torch.Tensor] = {}
    for file in files:
        tensors, _ = read_tensors(Path(file).expanduser())
        for token, tensor in tensors.items():
            if not (token.startswith("<") and token.endswith(">")) or tensor.ndim > 2:
                raise AdapterError(f"{file}: {token} is not an embedding of a token such as <s1>")
            embeddings[token] = tensor
    return embeddings


def _check_target(args: Namespace) -> None:
    """Check the options for the output; the default format of --to lora is kohya's."""
    if args.to is None and any(value is not None for value in (args.rank, args.conv_rank, args.sd_model)):
        raise UsageError("--rank, --conv_rank and --sd_model require --to lora (use resize to reduce a LoRA's rank)")
    if args.to is not None and args.rank is None:
        raise UsageError("--to lora needs --rank, the rank of the LoRA")
    if args.format is None and args.to is None:
        raise UsageError(f"--format is needed: {', '.join(FORMATS)}")
    if args.base_model != OTHER:  # for other models, the file's own spelling is used
        args.format = args.format or "kohya"


def as_lora(
    adapter: Adapter, name: str, rank: int, conv_rank: int | None = None, sd_model: str | None = None
) -> Adapter:
    """Approximate changes of other kinds, and pairs of higher rank, by pairs of a rank, and print the relative error.

    Args:
        adapter: The adapter.
        name: Its name in messages.
        rank: The rank of linear layers and 1x1 convolutions.
        conv_rank: The rank of larger convolutions; None takes `rank`.
        sd_model: The base model, for changes that depend on its weights.

    Returns:
        An adapter of low-rank pairs.

    Raises:
        AdapterError: A change depends on the model's weights, and the model is missing or does not fit.
    """
    base = BaseWeights.of(sd_model)
    adapter = weights_alone(adapter, name, base)
    high, fixed = {}, {}
    for module, change in adapter.modules.items():
        pair = as_pair(change)
        most = rank if pair is None or pair.kernel == (1, 1) or conv_rank is None else conv_rank
        if pair is not None and pair.rank <= most:
            fixed[module] = pair
        else:
            high[module] = change
    made: dict[ModuleName, LowRank] = {}
    if high:
        made, fits = reduce_modules(high, rules(rank, conv_rank), base_weight=base)
        say(report(fits, "a higher --rank"))
    modules = {module: fixed[module] if module in fixed else made[module] for module in adapter.modules}
    if not high and not adapter.stored:
        return adapter.with_modules(modules)
    return Adapter(modules, with_rank_facts(modules, adapter.plain_metadata()), embeddings=adapter.embeddings)


def convert(args: Namespace) -> None:
    """Run `lora-adapters convert`.

    Args:
        args: The options of the script's parser.

    Raises:
        UsageError: The options contradict each other.
        AdapterError: A file cannot be read, or does not fit the model.
    """
    _check_target(args)
    path = Path(args.save_to).expanduser() if args.format == "peft" else output_file(args.save_to)
    if args.embeddings and args.format != "cloneofsimo":
        raise UsageError("--embeddings requires cloneofsimo's format")
    if args.fold_alpha and args.format != "kohya":
        raise UsageError(f"--fold_alpha is for kohya's format; {args.format} does not need it")
    source = locate(args.model)
    adapter = load(source, args.zero_alpha, args.skip_unknown, args.base_model)
    if args.to == "lora":
        adapter = as_lora(adapter, args.model, args.rank, args.conv_rank, args.sd_model)
    embeddings = read_embeddings(args.embeddings)
    if source.is_file():
        tensors, _ = read_tensors(source)
        if cloneofsimo.matches(tensors):
            embeddings = {**cloneofsimo.embeddings(tensors), **embeddings}
    dtype = dtype_of(args.save_precision)
    if args.format == "cloneofsimo" or not embeddings:
        adapter.save(path, args.format, dtype, args.fold_alpha, embeddings or None)
        names = []
    else:
        with all_or_none(path.parent) as folder:  # write embeddings only if the adapter can be written
            names = save_embeddings(embeddings, folder, path.stem)
            adapter.save(path, args.format, dtype, args.fold_alpha)
    say(written(path, adapter))
    for name in names:
        say(f"embedding written to {path.with_name(name)}")
