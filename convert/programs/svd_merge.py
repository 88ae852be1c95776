"""The command svd-merge: merge LoRAs into one of a given rank."""

from argparse import Namespace

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.reduction import reduce_modules
from lora_adapters.convert.deltas.svd import as_written, report, rules, with_rank_facts
from lora_adapters.convert.devices import device_of
from lora_adapters.convert.programs.merge import load_all, merged_metadata
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.base_weights import BaseWeights
from lora_adapters.convert.tools.combining import combination_of, put_together
from lora_adapters.convert.tools.command_line import dtype_of, output_file
from lora_adapters.convert.tools.inputs import weights_alone
from lora_adapters.convert.tools.summary import written


def svd_merge(args: Namespace) -> None:
    """Run `lora-adapters svd-merge`.

    Args:
        args: The options of the script's parser.

    Raises:
        UsageError: The options contradict each other.
        AdapterError: A file cannot be read, or does not fit the others.
    """
    path, device, how = output_file(args.save_to), device_of(args.device), combination_of(args)
    rank = 4 if args.new_rank is None and args.target_error is None else args.new_rank
    chosen = rules(rank, args.new_conv_rank, args.target_error)
    adapters, ratios = load_all(args.models, args.ratios, args.lbws, args.skip_unknown, args.base_model)
    base = BaseWeights.of(args.sd_model)
    adapters = {name: weights_alone(adapter, name, base) for name, adapter in adapters.items()}
    merged = put_together(adapters, ratios, how)
    facts = merged_metadata(merged, adapters, args.no_metadata)
    del adapters  # the files need not stay in memory
    modules, fits = reduce_modules(merged.modules, chosen, args.clamp_quantile, device, base_weight=base)
    metadata = with_rank_facts(modules, facts)
    result = Adapter(modules, metadata).to(dtype_of(args.save_precision, args.precision))
    result.save(path, modelspec=not args.no_metadata)
    more = "a higher --new_rank, or --target_error 0.1,"
    say(report(as_written(fits, modules, result.pairs()), more))
    say(written(path, result))
