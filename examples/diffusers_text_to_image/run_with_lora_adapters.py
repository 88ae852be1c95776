#!/usr/bin/env python3
"""Run a training script of diffusers with `LoraConfig` replaced by one of this package's configs.

usage: run_with_lora_adapters.py SCRIPT [--adapter TYPE] [--conv_dim N] ... -- [arguments of the script]

The script's own `r`, `lora_alpha` and other LoraConfig arguments are kept; its target_modules are left out, so that the
type decides which modules are adapted, unless --keep_target_modules asks for them. The script's file is not changed.
"""

import argparse
import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

CONFIGS = {"lierla": "LierLaConfig", "c3lier": "C3LierConfig", "dylora": "DyLoraConfig"}
ONLY_DYLORA = ("unit", "rank_scaling", "freeze_lower", "rank_sampling")
HERE = ModuleType("lora_adapters_in_this_run")  # what the script imports LoraConfig from


class _Import(ast.NodeTransformer):
    """`from peft import ..., LoraConfig, ...` takes LoraConfig from HERE; nobody else's LoraConfig is touched."""

    done = False

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        mine = [name for name in node.names if name.name == "LoraConfig"] if node.module == "peft" else []
        if not mine:
            return node
        self.done = True
        node.names = [name for name in node.names if name not in mine]
        swapped = ast.copy_location(ast.ImportFrom(module=HERE.__name__, names=mine, level=0), node)
        return [node, swapped] if node.names else swapped


def config_factory(options: argparse.Namespace) -> Any:
    """What stands for LoraConfig in the script: takes LoraConfig's arguments, gives back this package's config."""
    import lora_adapters

    config = getattr(lora_adapters, CONFIGS[options.adapter])
    names = ("conv_dim", "conv_alpha", *ONLY_DYLORA)
    own = {name: getattr(options, name) for name in names if getattr(options, name) is not None}

    def lora_config(**given: Any) -> Any:
        if not options.keep_target_modules:
            given.pop("target_modules", None)
        return config(**given, **own)

    return lora_config


def run(script: Path, options: argparse.Namespace, arguments: list[str]) -> None:
    """Run the script as Python does: as __main__, with its own folder first on sys.path."""
    try:
        tree = ast.parse(script.read_bytes(), filename=str(script))
    except OSError as error:
        sys.exit(f"error: {script}: {error.strerror}")
    except SyntaxError as error:
        sys.exit(f"error: {script} is no Python script: {error.msg}, line {error.lineno}")
    importer = _Import()
    tree = ast.fix_missing_locations(importer.visit(tree))
    if not importer.done:
        sys.exit(f"error: {script} does not say `from peft import LoraConfig`: nothing to replace")
    try:
        HERE.LoraConfig = config_factory(options)  # type: ignore[attr-defined]
    except ImportError as error:
        sys.exit(f"error: {error}")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules.update({"__main__": main, HERE.__name__: HERE})
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    try:
        exec(compile(tree, str(script), "exec"), main.__dict__)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {script} needs the package {error.name}: pip install {error.name}")
    except ImportError as error:  # of diffusers' check_min_version: a script that is newer than the library
        sys.exit(f"error: {script}: {' '.join(str(error).split())}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="run_with_lora_adapters.py",
        usage="%(prog)s SCRIPT [options] -- [arguments of the script]",
        description="Run a training script of diffusers with LoraConfig replaced by one of lora_adapters' configs.",
    )
    parser.add_argument("script", type=Path, help="your copy of the script")
    parser.add_argument("--adapter", choices=CONFIGS, default="c3lier", help="type of the adapter (%(default)s)")
    parser.add_argument("--conv_dim", type=int, help="rank of convolutions larger than 1x1 (c3lier: 4)")
    parser.add_argument("--conv_alpha", type=float, help="their alpha (1)")
    parser.add_argument("--unit", type=int, help="dylora: ranks are trained in steps of this (1)")
    parser.add_argument("--rank_scaling", help="dylora: scale at rank b")
    parser.add_argument("--rank_sampling", help="dylora: how the rank of a step is drawn")
    parser.add_argument("--freeze_lower", action="store_true", default=None, help="dylora: train the last unit only")
    parser.add_argument("--keep_target_modules", action="store_true", help="adapt what the script says, and no more")
    split = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:split])
    if options.adapter != "dylora":
        for name in ONLY_DYLORA:
            if getattr(options, name) is not None:
                parser.error(f"--{name} is for --adapter dylora")
    return options, argv[split + 1 :]


if __name__ == "__main__":
    chosen, rest = parse(sys.argv[1:])
    run(chosen.script, chosen, rest)
