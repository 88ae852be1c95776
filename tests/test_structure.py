"""What CONTRIBUTING says of the source code: sizes of functions and files, private names, and who knows base models."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_adapters import types

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("convert", "lora_adapters", "train")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
FUNCTION_LINES, FILE_LINES = 60, 400

# Private names of libraries that have no public counterpart, each in the files that CONTRIBUTING names.
PRIVATE = {
    "_register_custom_module": "lora_adapters/grafting.py",
    "_replace": "",  # public, of named tuples
    "_modules": "lora_adapters/",
    "_parameters": ("lora_adapters/", "train/models/block_swap.py"),
    "_forward_hooks": "lora_adapters/",
    "_forward_pre_hooks": "lora_adapters/",
    "_forward_pre_hooks_with_kwargs": "lora_adapters/types/dylora/rank_controller.py",
    "_ConvNd": "lora_adapters/plugin.py",
    "_orig_mod": "lora_adapters/injection.py",
    "_version": "lora_adapters/fusing.py",
    "_conv_forward": "lora_adapters/types/lycoris/operations.py",
    "_apply": "train/models/block_swap.py",
    "_set_params_and_buffers_to_ignore_for_model": "train/models/block_swap.py",
    "_cdata": "train/training/activations.py",
    "_hf_peft_config_loaded": "lora_adapters/",
    "_active_adapter": "lora_adapters/grafting.py",
    "_caches": "lora_adapters/",
    "_prepare_lora_hotswap_kwargs": "lora_adapters/hotswap.py",
    "_optionally_disable_offloading": "lora_adapters/pipeline.py",
    "_lora_loadable_modules": "lora_adapters/pipeline.py",
    "_maybe_remove_and_reapply_group_offloading": "lora_adapters/pipeline.py",
    "_gradient_checkpointing_func": "train/training/activations.py",
    "_reset_state": "train/training/setup.py",
    "_fingerprint": "train/data/huggingface.py",
    "_actions": "lora_adapters/completion.py",
    "_SubParsersAction": "lora_adapters/completion.py",
    "_ArgumentGroup": "train/options/parser.py",
    "_fill_text": "convert/tools/parser.py",
}
# Where base models are described. Elsewhere their names are defaults and choices that a user reads, and decide nothing.
FAMILIES = ("convert/families/", "train/models/", "train/objective/")
NAMED_FOR_USERS = {
    ("lora_adapters/block_lr.py", "sd"),  # default of a public function
    ("lora_adapters/kohya_options.py", "sd"),
    ("train/preparing/options.py", "sd"),  # --family
    ("train/preparing/options.py", "sdxl"),
    ("convert/tools/model_arguments.py", "unet"),  # <lora:name:unet=0.5>
}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for file, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield file, node


def test_functions_and_files_are_short() -> None:
    long = [
        (file, node.name)
        for file, node in functions()
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert long == []
    lines = {file: (ROOT / file).read_text(encoding="utf-8").count("\n") for file in SOURCES}
    assert [file for file, count in lines.items() if count > FILE_LINES] == []


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private attributes of others than self, cls and the same class, and private names that are imported."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        target.attr for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (name.name for name in node.names if re.match(r"_[^_]", name.name))
        elif isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in own:
            yield from [] if ast.unparse(node.value) in ("self", "cls", "super()") else [node.attr]


@pytest.mark.parametrize("file", SOURCES)
def test_private_names_of_others_are_those_that_are_listed(file) -> None:
    strange = {name for name in private_names(SOURCES[file]) if not file.startswith(PRIVATE.get(name, "nowhere"))}
    assert not strange


def test_only_families_know_base_models() -> None:
    names = re.compile(r"sd|sdxl|sd1|sd2|unet")
    docstrings = {
        id(node.body[0].value)
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        if isinstance(node.body[0], ast.Expr)
    }
    found = {
        (file, node.value)
        for file, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and names.fullmatch(node.value)
        if id(node) not in docstrings and not file.startswith(FAMILIES)
    }
    assert found == NAMED_FOR_USERS


# What a docstring needs. One line is enough for a private function, and for a public one with up to four parameters.
# A longer docstring has the sections of Google's style: Args with every parameter, Returns or Yields if something is
# returned, Raises if the function itself raises. So has that of every function in `__all__`, and with five parameters
# or more. A method that overrides one with a docstring, and a property, need none; "see `name`" refers to another one.
ONE_LINE_PARAMETERS = 4
EXPORTED = set(types.PUBLIC) | {"add_adapter", "block_lr_weights", "network_options", "param_groups", "sort_components"}


class Documented(NamedTuple):
    """A public function or method: its file, dotted name, the class that it is in (if any), and the function."""

    file: str
    name: str
    owner: ast.ClassDef | None
    function: ast.FunctionDef

    @property
    def parameters(self) -> list[str]:
        args = self.function.args
        every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
        return [arg.arg for arg in every if arg is not None and arg.arg not in ("self", "cls")]

    @property
    def is_property(self) -> bool:
        return bool({ast.unparse(mark) for mark in self.function.decorator_list} & {"property", "cached_property"})


def public_functions() -> Iterator[Documented]:
    def visit(file: str, body: list[ast.stmt], prefix: str, owner: ast.ClassDef | None) -> Iterator[Documented]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(file, node.body, f"{prefix}{node.name}.", node)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield Documented(file, prefix + node.name, owner, node)

    for file, tree in SOURCES.items():
        yield from visit(file, tree.body, "", None)


def raises(function: ast.AST) -> bool:
    """Whether an exception is raised in the function itself, not in those inside of it; NotImplementedError is none."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" not in ast.unparse(node.exc):
            return True
        if raises(node):
            return True
    return False


def faults(it: Documented, overridden: bool) -> Iterator[str]:
    """What the docstring of a public function lacks."""
    text = ast.get_docstring(it.function)
    if it.is_property or (text is None and overridden):
        return
    if text is None:
        yield "a docstring"
        return
    short = len(text.splitlines()) == 1 and (len(it.parameters) <= ONE_LINE_PARAMETERS or overridden or "see `" in text)
    if short and it.name not in EXPORTED:
        return
    sections = dict(re.findall(r"^(Args|Returns|Yields|Raises):\n((?:[ ]{4}.*\n?|\n)+)", text, re.MULTILINE))
    named = re.findall(r"^    \*{0,2}(\w+)(?: \(.*?\))?:", sections.get("Args", ""), re.MULTILINE)
    if named != it.parameters:
        yield f"Args with {', '.join(it.parameters)}, not {', '.join(named) or 'none'}"
    result = it.function.returns
    if result is not None and ast.unparse(result) not in ("None", "NoReturn") and not sections.keys() & _RESULTS:
        yield "Returns"
    if raises(it.function) and "Raises" not in sections:
        yield "Raises"


_RESULTS = {"Returns", "Yields"}


def test_docstrings_say_what_goes_in_and_what_comes_out() -> None:
    functions_with_text: dict[str, set[ast.ClassDef | None]] = {}
    every = list(public_functions())
    for it in every:
        if ast.get_docstring(it.function) is not None:
            functions_with_text.setdefault(it.function.name, set()).add(it.owner)
    missing = [
        f"{it.file}: {it.name} needs {fault}"
        for it in every
        for fault in faults(
            it,
            it.owner is not None
            and bool(it.owner.bases and functions_with_text.get(it.function.name, {it.owner}) - {it.owner}),
        )
    ]
    assert missing == []
