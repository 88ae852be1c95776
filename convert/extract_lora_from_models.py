#!/usr/bin/env python3
"""Extract the LoRA between two models: the best approximation of what fine-tuning changed.

usage: extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors --dim 32
                                   --save_to lora.safetensors
       extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors --algo lokr --factor 4
                                   --save_to lokr.safetensors

Models are checkpoint files (.safetensors, .ckpt) or Diffusers folders, in any combination.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lora_adapters.convert.deltas.svd import as_written, report
from lora_adapters.convert.devices import device_of
from lora_adapters.convert.errors import AdapterError, UsageError
from lora_adapters.convert.families.registry import FAMILIES, asked_by
from lora_adapters.convert.models.extraction import ALGORITHMS
from lora_adapters.convert.parsing import number
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.command_line import (
    Parser,
    add_dtype,
    dtype_of,
    output_file,
    rank_option,
    refuse,
    run,
)
from lora_adapters.convert.tools.extract import extract, extract_otherwise
from lora_adapters.convert.tools.summary import written


def parser() -> Parser:
    """The options."""
    made = Parser(
        prog="extract_lora_from_models.py",
        description="Extract the LoRA between two models.",
        examples=["--model_org base.safetensors --model_tuned tuned.safetensors --dim 32 --save_to lora.safetensors"],
    )
    made.add_argument("--model_org", required=True, help="the original model: checkpoint file or Diffusers folder")
    made.add_argument("--model_tuned", required=True, help="the fine-tuned model: checkpoint file or Diffusers folder")
    made.add_argument("--save_to", required=True, help="the resulting file")
    made.add_argument(
        "--algo",
        choices=("lora", *ALGORITHMS),
        default="lora",
        help="what to write: low-rank pairs (lora, the default), Kronecker products, or the differences themselves",
    )
    made.add_argument("--factor", type=int, help="size of LoKr's first factor (default: -1, near the square root)")
    made.add_argument("--dim", type=rank_option, help="rank of the LoRA (default: 4; with target_error: no limit)")
    made.add_argument("--conv_dim", type=int, help="rank of convolutions above 1x1 (default: leave them out)")
    made.add_argument("--target_error", type=number, help="smallest ranks (lokr: file) with this relative error")
    made.add_argument("--min_diff", type=number, default=0.0, help="leave out text encoders that differ no more (0)")
    made.add_argument(
        "--clamp_quantile",
        type=number,
        help="clamp factors to this quantile as kohya's scripts do (there 0.99; default: no); slow",
    )
    made.add_argument("--device", help="where to compute: cpu (default), cuda, ...")
    add_dtype(made, "--save_precision", "of the result (default: float)")
    made.add_argument("--v2", action="store_true", help="the models must be SD2.x (recognised without this)")
    made.add_argument("--v_parameterization", action="store_true", help="the models predict v (SD2.x)")
    made.add_argument("--sdxl", action="store_true", help="the models must be SDXL (recognised without this)")
    made.add_argument("--no_metadata", action="store_true", help="write kohya's least metadata only, no modelspec")
    refuse(made, "--load_precision", "models are read as they are, and subtracted in float")
    for flag in ("--load_original_model_to", "--load_tuned_model_to"):
        refuse(made, flag, "models stay on the disk; --device says where to compute")
    return made


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    path, device = output_file(args.save_to), device_of(args.device)
    _check_options(args)
    _check_version(args)
    models = (args.model_org, args.model_tuned)
    common = {"min_diff": args.min_diff, "device": device, "v_prediction": args.v_parameterization}
    if args.algo == "lora":
        dim = 4 if args.dim is None and args.target_error is None else args.dim
        common |= {"target_error": args.target_error, "clamp_quantile": args.clamp_quantile}
        found = extract(*models, dim, args.conv_dim, **common)
    else:
        if args.algo == "lokr":
            common |= {"factor": args.factor or -1, "target_error": args.target_error}
        found = extract_otherwise(*models, args.algo, **common)
    for component, value in found.largest.items():
        left = ": the same, left out" if component in found.left_out else ""
        say(f"{component}: largest difference {value:.4g}{left}")
    result = found.adapter.to(dtype_of(args.save_precision))
    result.save(path, modelspec=not args.no_metadata)
    more = "--target_error 0.1" if args.algo == "lokr" else "a higher --dim, or --target_error 0.1,"
    say(report(as_written(found.fits, found.adapter.modules, result.modules), more))
    say(written(path, result))


def _check_options(args) -> None:
    """UsageError for options that the kind of adapter has no use for."""
    unfit = {"lora": ["factor"], "lokr": ["dim", "conv_dim", "clamp_quantile"]}
    unfit["full"] = [*unfit["lora"], *unfit["lokr"], "target_error"]
    for name in unfit[args.algo]:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} does not go with --algo {args.algo}")
    if args.factor is not None and args.target_error is not None:
        raise UsageError("--factor and --target_error are two ways to choose the size of a LoKr: give one")
    if args.factor is not None and args.factor < 1 and args.factor != -1:
        raise UsageError(f"--factor {args.factor} is none: it is 1 or more, or -1")


def _check_version(args) -> None:
    """AdapterError where the model is another one than a flag such as --v2 says."""
    for option, start in {option: start for family in FAMILIES for option, start in family.options.items()}.items():
        if getattr(args, option):
            version = Checkpoint.open(args.model_org).base_version
            if not asked_by(option, version):
                raise AdapterError(f"{args.model_org} is {version}, not {start} as the options say")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
