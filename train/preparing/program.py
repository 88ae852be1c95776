"""`lora-adapters init`: inspects a folder of images, chooses settings, writes them, and prints the reasons."""

from collections.abc import Sequence
from pathlib import Path

from lora_adapters.convert.terminal import say
from lora_adapters.convert.tools.command_line import run
from lora_adapters.train.preparing import options

parser = options.parser


def program(argv: Sequence[str] | None) -> None:
    """Parse the options, choose settings, write them and print the reasons."""
    path, settings = options.parse(argv)
    from lora_adapters.train.preparing.choose import plan
    from lora_adapters.train.preparing.describe import chosen, seen
    from lora_adapters.train.preparing.look import look
    from lora_adapters.train.preparing.write import write

    folders = look(path)
    made = plan(folders, settings)
    files = write(made, Path(settings.out), settings.overwrite)
    for folder in folders:
        say("\n".join(seen(folder, int(made.dataset["resolution"].value))))
    say(f"chosen, from the presets {', '.join(preset.name for preset in made.presets)} and from the images:")
    say("\n".join(chosen(made)))
    config = files[1]
    say(f"wrote {', '.join(map(str, files))}, with the reason for each value")
    say(f"next: lora-adapters train --config_file {config} --dry_run, then the same without --dry_run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)
