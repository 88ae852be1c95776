"""The script that completes commands and options in a shell."""

import shutil
import subprocess
import sys

import pytest

from lora_adapters import cli, completion

pytest.importorskip("shtab")

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_lora_adapters lora-adapters "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "bash"
    file.write_text(completion.script("bash"))
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("lora-adapters mer", "merge"),
        ("lora-adapters resize", "resize resize-images"),
        ("lora-adapters train --network_d", "--network_dim --network_dropout"),
        ("lora-adapters train --mixed_precision b", "bf16"),
        ("lora-adapters train --zero_st", ""),  # what is refused is not offered
        ("lora-adapters info --js", "--json"),
    ],
)
def test_bash_completes(script, words, completed) -> None:
    done = subprocess.run(["bash", "-c", ASK.format(script=script, words=words)], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (completed, "")


def test_every_command_is_in_it() -> None:
    (commands,) = (
        action for action in completion.whole_parser()._actions if action.dest == "==SUPPRESS==" and action.choices
    )
    assert list(commands.choices) == list(cli.PROGRAMS)


def test_without_shtab_one_line_says_what_to_install(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == 'error: completion needs shtab: pip install "lora-adapters[completion]"\n'
    assert cli.main(["completion", "fish"]) == 2
