#!/usr/bin/env python3
"""Write a LoRA in another format: kohya's, diffusers', a PEFT folder, or cloneofsimo's.

usage: convert_format.py --model kohya.safetensors --save_to folder --format peft
       convert_format.py --model cloneofsimo.safetensors --save_to kohya.safetensors --format kohya

What --model is, is recognised. Textual-inversion embeddings in cloneofsimo's files are written beside the result, one
file for each token (result.s1.safetensors for <s1>), as pipe.load_textual_inversion reads them; --embeddings puts such
files back into a file of cloneofsimo's format.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import safetensors.torch
import torch

from lora_adapters.convert.adapter import FORMATS
from lora_adapters.convert.errors import AdapterError, UsageError
from lora_adapters.convert.formats import cloneofsimo
from lora_adapters.convert.storage.files import all_or_none, read_tensors, replacing
from lora_adapters.convert.storage.sources import locate
from lora_adapters.convert.tools.command_line import Parser, add_dtype, add_skip_unknown, dtype_of, output_file, run
from lora_adapters.convert.tools.inputs import ZERO_ALPHA, load


def parser() -> Parser:
    """The options."""
    made = Parser(prog="convert_format.py", description="Write a LoRA in another format.")
    made.add_argument("--model", required=True, help="the LoRA: a file, a PEFT folder or a Hub repository")
    made.add_argument("--save_to", required=True, help="the result: a file, or a folder for peft")
    made.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    made.add_argument("--fold_alpha", action="store_true", help="one alpha in all modules, for stock diffusers")
    made.add_argument("--zero_alpha", choices=ZERO_ALPHA, help="what an alpha of 0 is: the rank, or no effect (none)")
    made.add_argument("--embeddings", nargs="+", default=[], help="embedding files to put into cloneofsimo's format")
    add_skip_unknown(made)
    add_dtype(made, "--save_precision", "of the result (default: as it is)")
    return made


def save_embeddings(embeddings: dict[str, torch.Tensor], folder: Path, stem: str) -> list[str]:
    """Write each token's embedding to a file of its own in the folder; their names begin with the stem."""
    written: list[str] = []
    for token, tensor in embeddings.items():
        word = re.sub(r"[^\w-]+", "_", token).strip("_") or "token"
        name = f"{stem}.{word}.safetensors"
        name = name if name not in written else f"{stem}.{word}-{len(written)}.safetensors"
        with replacing(folder / name) as partial:
            safetensors.torch.save_file({token: tensor.contiguous()}, partial)
        written.append(name)
    return written


def read_embeddings(files: Sequence[str]) -> dict[str, torch.Tensor]:
    """The embeddings in files of one token each."""
    found: dict[str, torch.Tensor] = {}
    for file in files:
        tensors, _ = read_tensors(Path(file).expanduser())
        for token, tensor in tensors.items():
            if not (token.startswith("<") and token.endswith(">")) or tensor.ndim > 2:
                raise AdapterError(f"{file}: {token} is no embedding of a token such as <s1>")
            found[token] = tensor
    return found


def program(argv: Sequence[str] | None) -> None:
    """The program's body."""
    args = parser().parse_args(argv)
    path = Path(args.save_to).expanduser() if args.format == "peft" else output_file(args.save_to)
    if args.embeddings and args.format != "cloneofsimo":
        raise UsageError("--embeddings can only be put into cloneofsimo's format")
    if args.fold_alpha and args.format != "kohya":
        raise UsageError(f"--fold_alpha is for kohya's format; {args.format} does not need it")
    source = locate(args.model)
    adapter = load(source, args.zero_alpha, args.skip_unknown)
    embeddings = read_embeddings(args.embeddings)
    if source.is_file():
        tensors, _ = read_tensors(source)
        if cloneofsimo.is_mine(set(tensors)):
            embeddings = {**cloneofsimo.embeddings(tensors), **embeddings}
    dtype = dtype_of(args.save_precision)
    if args.format == "cloneofsimo" or not embeddings:
        adapter.save(path, args.format, dtype, args.fold_alpha, embeddings or None)
        names = []
    else:
        with all_or_none(path.parent) as folder:  # if the adapter cannot be written, the embeddings are not either
            names = save_embeddings(embeddings, folder, path.stem)
            adapter.save(path, args.format, dtype, args.fold_alpha)
    print(f"{adapter} written to {path}")
    for name in names:
        print(f"embedding written to {path.with_name(name)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return run(program, argv)


if __name__ == "__main__":
    sys.exit(main())
