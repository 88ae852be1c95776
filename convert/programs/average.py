"""The command average: several LoRAs, such as the saves of a training, into one."""

from argparse import Namespace

import torch

from lora_adapters.convert.deltas.svd import as_written, report
from lora_adapters.convert.errors import UsageError
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.average import average
from lora_adapters.convert.tools.command_line import dtype_of, output_file
from lora_adapters.convert.tools.inputs import load
from lora_adapters.convert.tools.summary import written


def average_files(args: Namespace) -> None:
    """Run `lora-adapters average`.

    Args:
        args: The options of the script's parser.

    Raises:
        UsageError: The options contradict each other.
        AdapterError: A file cannot be read, or does not fit the others.
    """
    path = output_file(args.save_to)
    if len(args.models) < 2:
        raise UsageError("average needs two or more files")
    if twice := next((name for name in args.models if args.models.count(name) > 1), None):
        raise UsageError(f"{twice} is given twice")
    exact, fits = average(
        {name: load(name, skip_unknown=args.skip_unknown, base_model=args.base_model) for name in args.models}
    )
    result = exact.to(dtype_of(args.save_precision) or torch.float32)
    result.save(path, modelspec=not args.no_metadata)
    pairs = {module: fit for module, fit in fits.items() if fit.total}
    if pairs:
        say(report(as_written(pairs, exact.modules, result.modules), "svd-merge at a higher --new_rank"))
    say(written(path, result))
