"""`lora-adapters studio`: serves a page on this machine to compare, inspect, train and convert adapters."""

import os
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_adapters.convert.errors import UsageError
from lora_adapters.convert.tools.command_line import run
from lora_adapters.convert.tools.parser import Parser
from lora_adapters.train.studio.access import PASSWORD, USER, launch_options, password
from lora_adapters.train.studio.jobs import claim
from lora_adapters.train.studio.paths import Folders, StudioError


def parser() -> Parser:
    """The parser of the options."""
    made = Parser(
        prog="studio",
        description="Open a page in the browser to compare, inspect, train and convert adapters.",
        examples=["--model stable-diffusion-v1-5/stable-diffusion-v1-5 --adapters loras --images photos"],
    )
    made.add_argument("--model", required=True, help="base model: checkpoint file, Diffusers folder or Hub id")
    made.add_argument("--adapters", nargs="+", metavar="FOLDER", help="folders of adapters to choose from")
    made.add_argument("--images", nargs="+", action="extend", metavar="FOLDER", help="folders of training images, "
                      "whose captions can be edited")  # fmt: skip
    made.add_argument("--pictures", nargs="+", action="extend", dest="images", help=SUPPRESS)  # former name
    made.add_argument("--output", default="studio", metavar="FOLDER", help="folder for everything that is created")
    made.add_argument(
        "--model_config", help="Diffusers folder or Hub id with the configs and tokenizers for a checkpoint file"
    )
    made.add_argument("--fp16", action="store_true", help="generate in fp16")
    made.add_argument("--bf16", action="store_true", help="generate in bf16")
    made.add_argument("--offload", choices=["model", "sequential"], help="keep the models in CPU memory and move each "
                      "model or each layer to the device while it computes")  # fmt: skip
    made.add_argument("--port", type=int, help="port of the page (default: the first free port from 7860)")
    made.add_argument(
        "--listen", action="store_true", help="allow connections from other machines; requires a password"
    )
    made.add_argument("--share", action="store_true", help="create a public address through Gradio's servers; requires "
                      "a password")  # fmt: skip
    made.add_argument("--password_file", help=f"file with the password of user {USER!r}; the environment "
                      f"variable {PASSWORD} can be set instead")  # fmt: skip
    return made


def folders(args: Any) -> Folders:
    """The folders given by the options. UsageError if one does not exist."""
    for flag in ("adapters", "images"):
        for name in getattr(args, flag) or ():
            if not Path(name).expanduser().is_dir():
                raise UsageError(f"--{flag} {name} is not a folder")
    output = Path(args.output).expanduser()
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is not a folder")
    made = Folders(
        args.model,
        output.absolute(),
        tuple(Path(name).expanduser().absolute() for name in args.adapters or ()),
        tuple(Path(name).expanduser().absolute() for name in args.images or ()),
    )
    made.private.mkdir(parents=True, exist_ok=True)
    return made


def model_words(args: Any) -> list[str]:
    """The options of `lora-adapters generate` that select the model."""
    words = [f"--ckpt={args.model}"]
    words += [f"--model_config={args.model_config}"] if args.model_config else []
    words += [f"--offload={args.offload}"] if args.offload else []
    return words + [f"--{name}" for name in ("fp16", "bf16") if getattr(args, name)]


def program(argv: Sequence[str] | None) -> None:
    """Parse the options and serve the page until Ctrl-C."""
    args = parser().parse_args(argv)
    if args.fp16 and args.bf16:
        raise UsageError("give one of --fp16 and --bf16")
    word, made = password(args), folders(args)
    claim(made.private / "studio.json")
    os.environ["GRADIO_TEMP_DIR"] = str(made.private / "page")  # gradio reads it when the page is built
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError:
        raise StudioError('the studio needs Gradio: pip install "lora-adapters[studio]"') from None
    from lora_adapters.train.studio.app import build
    from lora_adapters.train.studio.page import CSS

    page = build(made, model_words(args))
    theme = gr.themes.Default(  # without fonts from the internet
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, address, public = page.launch(theme=theme, css=CSS, **launch_options(args, word, made.output))
    except OSError as error:
        raise StudioError(f"the page cannot be opened: {error}") from None
    print(f"The studio is at {public or address} (Ctrl-C stops it; a running job continues)", flush=True)
    try:
        page.block_thread()
    except KeyboardInterrupt:
        page.close(verbose=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv, stopped="the studio has ended", traceback=True)


if __name__ == "__main__":
    sys.exit(main())
