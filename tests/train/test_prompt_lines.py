import pytest

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.prompt_lines import WHOLE, LineOption, numbered_lines, parse_line, read_prompt_file, whole

OPTIONS = {"w": LineOption("width", whole, WHOLE), "n": LineOption("negative"), "l": LineOption("scale", float)}


def test_a_line_is_a_prompt_and_its_options() -> None:
    line = "a (red:1.2) cat, well-known -- it's 1--2 --W 64  --n bad, -- worse --l 1.5"
    assert parse_line(line, OPTIONS, "here") == {
        "prompt": "a (red:1.2) cat, well-known -- it's 1--2",
        "width": 64,
        "negative": "bad, -- worse",
        "scale": 1.5,
    }
    assert parse_line("--n bad", OPTIONS, "here") == {"prompt": "", "negative": "bad"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x --w", "here: --w has no value; it takes a whole number"),
        ("x --w 6.5", "here: --w 6.5: it takes a whole number"),
        ("x --w -64", "here: --w -64: it takes"),
        ("x --w64", "here: --w64 in 'x --w64' is none of --w, --n, --l"),
        ("x --w 64 --w 64", "here: --w stands twice"),
        ("x --q 1", "here: --q is not there for a reason"),
    ],
)
def test_malformed_lines(line, message) -> None:
    with pytest.raises(TrainingError, match=f"^{message}"):
        parse_line(line, OPTIONS, "here", {"q": "is not there for a reason"})


def test_lines_keep_their_numbers() -> None:
    text = "# first\n\na\n  # indented\n b\u2028c \n"
    assert [*numbered_lines(text, "p.txt")] == [("a", "p.txt, line 3"), ("b\u2028c", "p.txt, line 5")]


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(TrainingError, match=r"--from_file .* cannot be read"):
        read_prompt_file(tmp_path / "none.txt", "--from_file")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(TrainingError, match=r"--from_file .*latin\.txt: not UTF-8 at byte 3"):
        read_prompt_file(tmp_path / "latin.txt", "--from_file")
    (tmp_path / "wide.txt").write_bytes("a cat\r\n".encode("utf-16"))
    assert read_prompt_file(tmp_path / "wide.txt", "--from_file") == "a cat\n"
