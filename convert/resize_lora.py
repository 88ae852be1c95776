#!/usr/bin/env python3
"""Give a LoRA a smaller rank: the best approximation, of a fixed rank or as small as each module allows.

usage: resize_lora.py --model big.safetensors --save_to small.safetensors --new_rank 8
       resize_lora.py --model big.safetensors --save_to small.safetensors --new_rank 32 --dynamic_method sv_fro
                      --dynamic_param 0.9

alpha / rank stays as it was in every module.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.deltas.low_rank import rank_range
from lora_adapters.convert.deltas.rank_choice import DYNAMIC_METHODS, dynamic
from lora_adapters.convert.deltas.reduction import reduce_modules
from lora_adapters.convert.deltas.svd import Rules, as_written, report, rules, with_rank_facts
from lora_adapters.convert.devices import device_of
from lora_adapters.convert.errors import UsageError
from lora_adapters.convert.parsing import number
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.command_line import (
    Parser,
    add_dtype,
    add_skip_unknown,
    dtype_of,
    output_file,
    rank_option,
    run,
)
from lora_adapters.convert.tools.inputs import load, weights_alone
from lora_adapters.convert.tools.summary import written


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="resize_lora.py",
        description="Give a LoRA a smaller rank.",
        examples=["--model big.safetensors --new_rank 8 --save_to small.safetensors"],
    )
    made.add_argument("--model", required=True, help="the LoRA: a file, a PEFT folder or a Hub repository")
    made.add_argument("--save_to", required=True, help="the resulting file")
    made.add_argument("--new_rank", type=rank_option, help="rank of the result, or the largest (default: 4)")
    made.add_argument("--new_conv_rank", type=rank_option, help="rank of convolutions above 1x1 (default: new_rank)")
    made.add_argument("--dynamic_method", choices=DYNAMIC_METHODS, help="choose the rank of each module")
    made.add_argument("--dynamic_param", type=number, help="what the method compares with, such as 0.9")
    made.add_argument("--target_error", type=number, help="smallest ranks with this relative error, new_rank at most")
    made.add_argument("--device", help="where to compute: cpu (default), cuda, ...")
    add_skip_unknown(made)
    made.add_argument("--svd_lowrank_niter", type=int, help="kohya's, accepted: the SVD is exact without iterations")
    made.add_argument("--verbose", action="store_true", help="show the rank and the error of each module")
    add_dtype(made, "--save_precision", "of the result (default: float)")
    return made


def chosen_rules(args) -> Rules:
    """The rules that the options ask for."""
    if (args.dynamic_method is None) != (args.dynamic_param is None):
        raise UsageError("--dynamic_method and --dynamic_param go together")
    if args.dynamic_method and args.target_error is not None:
        raise UsageError("--dynamic_method and --target_error are two ways to choose ranks: give one")
    if args.target_error is not None:
        return rules(args.new_rank, args.new_conv_rank, args.target_error)
    rank = 4 if args.new_rank is None else args.new_rank
    if args.dynamic_method is None:
        return rules(rank, args.new_conv_rank)
    conv = rank if args.new_conv_rank is None else args.new_conv_rank
    method, parameter = args.dynamic_method, args.dynamic_param
    return Rules(dynamic(method, parameter, rank), dynamic(method, parameter, conv))


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    path, device, chosen = output_file(args.save_to), device_of(args.device), chosen_rules(args)
    adapter = weights_alone(load(args.model, skip_unknown=args.skip_unknown), args.model)
    modules, fits = reduce_modules(adapter.modules, chosen, device=device, keep_scale=True)
    metadata = with_rank_facts(modules, adapter.plain_metadata())
    ranks = rank_range(one.rank for one in adapter.modules.values() if one.rank is not None)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
