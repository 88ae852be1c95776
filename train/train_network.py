#!/usr/bin/env python3
"""Train a LoRA-LierLa, LoRA-C3Lier or DyLoRA adapter for Stable Diffusion.

usage: accelerate launch train_network.py --pretrained_model_name_or_path=... --dataset_config=... --output_dir=...
       --network_module=networks.lora ...   (all options: --help)
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a file from a checkout: this folder is where Python looks first, the package is beside its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on command-line options; returns its exit status. Errors are one line on stderr."""
    from lora_adapters.train.errors import TrainingError
    from lora_adapters.train.options.arguments import parse
    from lora_adapters.train.quiet import quiet
    from lora_adapters.train.stopping import Interrupted, StopSignals

    quiet()
    try:
        settings = parse(argv)
        with StopSignals(at_once=True):
            not_pushed = _run(settings)
        if not_pushed:
            return _failed(
                f"{not_pushed} of the saves did not reach the Hub (see above); they are in {settings.output_dir}"
            )
    except BrokenPipeError:
        raise
    except (TrainingError, OSError) as error:
        return _failed(error)
    except ValueError as error:
        from lora_adapters.convert.errors import AdapterError
        from lora_adapters.train.data_error import DataError

        if not isinstance(error, AdapterError | DataError):
            raise
        return _failed(error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _failed(
            "the device has too little memory: try --gradient_checkpointing, a smaller batch, or --cache_latents"
        )
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        _failed(stopped)
        return stopped.status
    return 0


def _run(settings) -> int:
    """Train. Returns how many saves did not reach the Hub."""
    from lora_adapters.train.training.trackers import start_console

    start_console(settings)
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

    disable_progress_bar()  # one bar is enough: that of training
    disable_transformers_progress_bar()
    from lora_adapters.train.training.loop import train_prepared
    from lora_adapters.train.training.setup import prepare

    run = prepare(settings)
    if settings.dry_run:
        from lora_adapters.train.training.dry_run import report

        if run.accelerator.is_main_process:
            print(report(run))
        return 0
    return len(train_prepared(run).not_pushed)


def _failed(error: BaseException | str) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
