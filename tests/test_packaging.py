"""What pyproject.toml says about the package agrees with the folders."""

import sys
from importlib import metadata
from pathlib import Path

import lora_adapters

ROOT = Path(__file__).parents[1]


def pyproject() -> dict:
    if sys.version_info < (3, 11):
        import tomli as tomllib
    else:
        import tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_modules_is_installed() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    folders = set()
    for package, top in setuptools["package-dir"].items():
        for file in (ROOT / top).rglob("*.py"):
            folders.add(".".join((package, *file.parent.relative_to(ROOT / top).parts)))
    assert sorted(setuptools["packages"]) == sorted(folders)


def test_the_version_is_written_once() -> None:
    project = pyproject()
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lora_adapters.__version__"}
    assert metadata.version("lora-adapters") == lora_adapters.__version__
    assert f"\nversion: {lora_adapters.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
