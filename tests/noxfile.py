"""Runs the tests with the oldest and with the newest releases that pyproject.toml allows.

usage: nox -f tests/noxfile.py [-s oldest|newest] [-- pytest options]

`oldest` installs exactly the lower bounds of pyproject.toml, `newest` the newest releases that it allows, each in its
own environment. Both also run `pip check`.
"""

import re
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["oldest", "newest"]

ROOT = Path(__file__).resolve().parent.parent
# Dependencies whose lower bound is installed; test tools are installed in any version.
BOUND = re.compile(r"^([A-Za-z0-9-]+)>=([0-9.]+)")


def lower_bounds() -> list[str]:
    """`name==version` of every dependency's lower bound."""
    bounds = [BOUND.match(one) for one in nox.project.load_toml(ROOT / "pyproject.toml")["project"]["dependencies"]]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound is not None and bound[1] != "tomli"]


def run(session: nox.Session) -> None:
    """Install the package, check its dependencies, and run the tests."""
    session.chdir(ROOT)
    session.install("-e", ".[test]", "--upgrade-strategy", "only-if-needed")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-m", "pytest", *(session.posargs or ["tests"]))


@nox.session
def oldest(session: nox.Session) -> None:
    """Test with the lower bounds."""
    session.install(*lower_bounds())
    run(session)


@nox.session
def newest(session: nox.Session) -> None:
    """Test with the newest releases that pyproject.toml allows."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".")
    run(session)
