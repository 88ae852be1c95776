"""Calls the file tools as users do."""

from pathlib import Path

from lora_adapters import cli

from .checkpoints import GOLDEN

ROOT = Path(__file__).parent.parent.parent
SD15 = GOLDEN / "sd15"
SCRIPTS = {
    "merge": "merge_lora", "svd-merge": "svd_merge_lora", "average": "average_lora",
    "extract": "extract_lora_from_models", "split": "extract_lora_from_dylora",
    "resize": "resize_lora", "convert": "convert_format", "info": "info",
}  # fmt: skip


def delta_distance(a, b):
    assert set(a.modules) == set(b.modules)
    return max(
        float((one.delta() - b.modules[module].delta().reshape(one.delta().shape)).abs().max())
        for module, one in a.modules.items()
    )


def run(capsys, *words):
    status = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out


def fails(capsys, *words, status=1):
    assert cli.main([str(word) for word in words]) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def misused(capsys, *words):
    """The error message of a usage error, with exit status 2."""
    return fails(capsys, *words, status=2)
