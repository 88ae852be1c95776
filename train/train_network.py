#!/usr/bin/env python3
"""Train a LoRA-LierLa, LoRA-C3Lier or DyLoRA adapter for Stable Diffusion.

usage: accelerate launch train_network.py --pretrained_model_name_or_path=... --dataset_config=... --output_dir=...
       --network_module=networks.lora ...   (all options: --help)
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a file from a checkout: replace this folder on Python's path by its parent, which contains the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.command_line import run


def program(argv: Sequence[str] | None) -> None:
    """Parse the options and train."""
    from lora_adapters.train.errors import TrainingError
    from lora_adapters.train.options.arguments import parse
    from lora_adapters.train.stopping import StopSignals

    with StopSignals(at_once=True):
        settings = parse(argv)
        from lora_adapters.train.training.trackers import console

        with console(settings):
            not_pushed = _train(settings)
    if not_pushed:
        raise TrainingError(
            f"{not_pushed} of the saves did not reach the Hub (see above); they are in {settings.output_dir}"
        )


def _train(settings) -> int:
    """Train. Returns the number of saves that could not be uploaded to the Hub."""
    from diffusers.utils.logging import disable_progress_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_progress_bar

    disable_progress_bar()  # only the progress bar of training is shown
    disable_transformers_progress_bar()
    from lora_adapters.train.training.loop import train_prepared
    from lora_adapters.train.training.setup import prepare

    prepared = prepare(settings)
    if settings.dry_run:
        from lora_adapters.train.training.dry_run import report

        if prepared.accelerator.is_main_process:
            print(report(prepared))
        return 0
    trained = train_prepared(prepared)
    if prepared.accelerator.is_main_process:
        from lora_adapters.convert.tools.summary import written
        from lora_adapters.train.training.saving import final_file

        say(written(final_file(prepared), trained.adapter, ", ".join(prepared.data.trigger_words)))
    return len(trained.not_pushed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on command-line options; returns its exit status."""
    advice = "try --gradient_checkpointing, a smaller batch, or --cache_latents"
    return run(program, argv, memory=advice, traceback=True)


if __name__ == "__main__":
    sys.exit(main())
