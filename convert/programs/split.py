"""The command split: split a DyLoRA into one LoRA for each rank."""

from argparse import Namespace
from dataclasses import replace

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.errors import AdapterError, UsageError
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.convert.progress import progress
from lora_adapters.convert.storage.files import all_or_none
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.command_line import output_file
from lora_adapters.convert.tools.inputs import load


def ranks_of(adapter: Adapter, asked: str | None) -> list[int]:
    """The ranks to write: the requested ones, or all ranks to which the adapter can be truncated."""
    highest = max(pair.rank for pair in adapter.pairs().values())
    unit = (adapter.dylora or DyLora()).unit
    if highest % unit:
        raise AdapterError(f"unit {unit} does not divide the rank {highest}: the adapter was not trained with it")
    if asked is None:
        return [*range(unit, highest, unit), highest]
    try:
        return sorted({int(number) for number in asked.split(",")})
    except ValueError:
        raise UsageError(f"--ranks is a list of numbers such as 4,8, not {asked}") from None


def split(args: Namespace) -> None:
    """Run `lora-adapters split`.

    Args:
        args: The options of the script's parser.

    Raises:
        UsageError: The options contradict each other.
        AdapterError: A file cannot be read or written.
    """
    path = output_file(args.save_to)
    adapter = load(args.model, skip_unknown=args.skip_unknown, base_model=args.base_model)
    adapter = adapter.sorted() if args.sort else adapter
    dylora = adapter.dylora
    if args.unit is not None and args.unit < 1:
        raise UsageError(f"--unit must be at least 1, got {args.unit}")
    if dylora is None and args.unit is None:
        raise AdapterError(f"{args.model} is not marked as a DyLoRA: give its --unit, or --sort")
    if dylora is None:
        dylora = DyLora(rank_scaling="rank")  # unmarked files are kohya's: use the scaling of kohya's script
    adapter = adapter.as_dylora(replace(dylora, unit=args.unit or dylora.unit))
    ranks = ranks_of(adapter, args.ranks)
    names = [f"{path.stem}-{rank:04d}{path.suffix}" for rank in ranks]
    with all_or_none(path.parent) as folder:  # after an error or Ctrl-C, no incomplete set of files is left
        for rank, name in progress(zip(ranks, names, strict=True), "splitting", len(ranks)):
            adapter.truncate(rank).save(folder / name)
    for name in names:
        say(path.with_name(name))
