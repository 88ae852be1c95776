"""The command extract: extract an adapter from two models."""

from argparse import Namespace

from lora_adapters.convert.deltas.svd import as_written, report
from lora_adapters.convert.devices import device_of
from lora_adapters.convert.errors import AdapterError, UsageError
from lora_adapters.convert.families.registry import FAMILIES, asked_by
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.command_line import dtype_of, output_file
from lora_adapters.convert.tools.extract import extract, extract_otherwise
from lora_adapters.convert.tools.summary import written


def extract_adapter(args: Namespace) -> None:
    """Run `lora-adapters extract`.

    Args:
        args: The options of the script's parser.

    Raises:
        UsageError: The options contradict each other.
        AdapterError: A file cannot be read, or the models do not fit.
    """
    path, device = output_file(args.save_to), device_of(args.device)
    _check_options(args)
    _check_version(args)
    models = (args.model_org, args.model_tuned)
    common = {"min_diff": args.min_diff, "device": device, "v_prediction": args.v_parameterization}
    if args.algo == "lora":
        dim = 4 if args.dim is None and args.target_error is None else args.dim
        common |= {"target_error": args.target_error, "clamp_quantile": args.clamp_quantile}
        extraction = extract(*models, dim, args.conv_dim, **common)
    else:
        if args.algo == "lokr":
            common |= {"factor": args.factor or -1, "target_error": args.target_error}
        extraction = extract_otherwise(*models, args.algo, **common)
    for component, value in extraction.largest.items():
        left = ": the same, left out" if component in extraction.left_out else ""
        say(f"{component}: largest difference {value:.4g}{left}")
    result = extraction.adapter.to(dtype_of(args.save_precision))
    result.save(path, modelspec=not args.no_metadata)
    more = "--target_error 0.1" if args.algo == "lokr" else "a higher --dim, or --target_error 0.1,"
    say(report(as_written(extraction.fits, extraction.adapter.modules, result.modules), more))
    say(written(path, result))


def _check_options(args: Namespace) -> None:
    """Raise UsageError for options that the kind of adapter does not use."""
    unfit = {"lora": ["factor"], "lokr": ["dim", "conv_dim", "clamp_quantile"]}
    unfit["full"] = [*unfit["lora"], *unfit["lokr"], "target_error"]
    for name in unfit[args.algo]:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} cannot be used with --algo {args.algo}")
    if args.factor is not None and args.target_error is not None:
        raise UsageError("--factor and --target_error both choose the size of a LoKr: give only one")
    if args.factor is not None and args.factor < 1 and args.factor != -1:
        raise UsageError(f"--factor must be -1, or at least 1, got {args.factor}")


def _check_version(args: Namespace) -> None:
    """Raise AdapterError if the model is not the one required by a flag such as --v2."""
    for option, start in {option: start for family in FAMILIES for option, start in family.options.items()}.items():
        if getattr(args, option):
            version = Checkpoint.open(args.model_org).base_version
            if not asked_by(option, version):
                raise AdapterError(f"{args.model_org} is {version}, but the options require {start}")
