"""The command resize: reduce the rank of a LoRA."""

from argparse import Namespace

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.deltas.rank_choice import dynamic
from lora_adapters.convert.deltas.reduction import reduce_modules
from lora_adapters.convert.deltas.svd import Rules, as_written, report, rules, with_rank_facts
from lora_adapters.convert.devices import device_of
from lora_adapters.convert.errors import UsageError
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.base_weights import BaseWeights
from lora_adapters.convert.tools.command_line import dtype_of, output_file
from lora_adapters.convert.tools.inputs import load, weights_alone
from lora_adapters.convert.tools.summary import written


def chosen_rules(args: Namespace) -> Rules:
    """The rank rules for the options."""
    if (args.dynamic_method is None) != (args.dynamic_param is None):
        raise UsageError("--dynamic_method and --dynamic_param require each other")
    if args.dynamic_method and args.target_error is not None:
        raise UsageError("--dynamic_method and --target_error both choose ranks: give only one")
    if args.target_error is not None:
        return rules(args.new_rank, args.new_conv_rank, args.target_error)
    rank = 4 if args.new_rank is None else args.new_rank
    if args.dynamic_method is None:
        return rules(rank, args.new_conv_rank)
    conv = rank if args.new_conv_rank is None else args.new_conv_rank
    method, parameter = args.dynamic_method, args.dynamic_param
    return Rules(dynamic(method, parameter, rank), dynamic(method, parameter, conv))


def resize(args: Namespace) -> None:
    """Run `lora-adapters resize`.

    Args:
        args: The options of the script's parser.

    Raises:
        UsageError: The options contradict each other.
        AdapterError: A file cannot be read, or does not fit the model.
    """
    path, device, chosen = output_file(args.save_to), device_of(args.device), chosen_rules(args)
    base = BaseWeights.of(args.sd_model)
    adapter = load(args.model, skip_unknown=args.skip_unknown, base_model=args.base_model)
    adapter = weights_alone(adapter, args.model, base)
    modules, fits = reduce_modules(adapter.modules, chosen, device=device, keep_scale=True, base_weight=base)
    metadata = with_rank_facts(modules, adapter.plain_metadata())
    ranks = rank_range(change.rank for change in adapter.modules.values() if change.rank is not None)
    before = f"; {adapter.metadata['ss_training_comment']}" if adapter.metadata.get("ss_training_comment") else ""
    metadata["ss_training_comment"] = f"resized from rank {ranks}{before}"
    if args.dynamic_method or args.target_error is not None:
        metadata |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    result = Adapter(modules, metadata).to(dtype_of(args.save_precision))
    fits = as_written(fits, modules, result.pairs())
    if args.verbose:
        for module, fit in fits.items():
            say(f"{module}: rank {adapter.modules[module].rank} -> {modules[module].rank}, error {fit.error:.4g}")
    result.save(path)
    say(report(fits, "a higher --new_rank, or --target_error 0.1,"))
    say(written(path, result))
