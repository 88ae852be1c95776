"""The tests against the oldest releases that pyproject.toml allows, and against the newest.

usage: nox -f tests/noxfile.py [-s oldest|newest] [-- pytest options]

`oldest` installs exactly the lower bounds of pyproject.toml, `newest` the newest releases that it allows. Each has an
environment of its own. Both also check that the installed package is what the versions say.
"""

import re
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["oldest", "newest"]

ROOT = Path(__file__).resolve().parent.parent
# Of these the lower bound itself is installed; the test tools come in whatever version there is.
BOUND = re.compile(r"^([A-Za-z0-9-]+)>=([0-9.]+)")


def lower_bounds() -> list[str]:
    """`name==version` of every dependency's lower bound."""
    bounds = [BOUND.match(one) for one in nox.project.load_toml(ROOT / "pyproject.toml")["project"]["dependencies"]]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound is not None and bound[1] != "tomli"]


def run(session: nox.Session) -> None:
    """Install the package as it is, see that it fits what is there, and run the tests."""
    session.chdir(ROOT)
    session.install("-e", ".[test]", "--upgrade-strategy", "only-if-needed")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-m", "pytest", *(session.posargs or ["tests"]))


@nox.session
def oldest(session: nox.Session) -> None:
    """The lower bounds."""
    session.install(*lower_bounds())
    run(session)


@nox.session
def newest(session: nox.Session) -> None:
    """The newest releases that pyproject.toml allows."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".")
    run(session)
