import pytest

from lora_adapters.convert.parsing import number
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation.prompt_lines import (
    WHOLE,
    LineOption,
    numbered_lines,
    parse_line,
    read_prompt_file,
    whole,
)

OPTIONS = {
    "w": LineOption("width", whole, WHOLE),
    "n": LineOption("negative", empty=True),
    "l": LineOption("scale", number, "a number"),
}


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
        ("x --n a --n b", "here: --n is given twice"),
        ("x --w 6.5", "here: --w 6.5: it takes a whole number"),
        ("x --w -64", "here: --w -64: it takes"),
        ("x --w64", "here: --w64 in 'x --w64' is not one of --w, --n, --l"),
        ("x --w 64 --w 64", "here: --w is given twice"),
        ("x --q 1", "here: --q is not there for a reason"),
    ],
)
def test_malformed_lines(line, message) -> None:
    with pytest.raises(TrainingError, match=f"^{message}"):
        parse_line(line, OPTIONS, "here", {"q": "is not there for a reason"})


@pytest.mark.parametrize(
    ("line", "table", "said"),
    [
        ("x --w 64.0", {"width": 64}, ""),
        ("x --n", {"negative": ""}, ""),
        ("x --w 28.5 --l 2", {"width": 28, "scale": 2.0}, "here: --w 28.5: it takes a whole number; read as 28"),
        ("x --w 768, fine", {"width": 768}, "here: --w 768, fine: it takes a whole number; read as 768"),
        ("x --l 4.5x", {"scale": 4.5}, "here: --l 4.5x: it takes a number; read as 4.5"),
        ("x --l", {}, "here: --l has no value; it takes a number; ignored"),
        (f"x --w {'9' * 5000}x", {}, f"here: --w {'9' * 5000}x: it takes a whole number; ignored"),
        ("x --w -64", {}, "here: --w -64: it takes a whole number; ignored"),
        ("x --w64 --l 1", {"scale": 1.0}, "here: --w64 in 'x --w64 --l 1' is not one of --w, --n, --l; ignored"),
        ("x --w 1 --w 2", {"width": 2}, "here: --w is given twice; the last is used"),
    ],
)
def test_parts_that_cannot_be_read_are_left_out_where_that_is_asked_for(line, table, said) -> None:
    left: list[str] = []
    assert parse_line(line, OPTIONS, "here", leave_out=left.append) == {"prompt": "x", **table}
    assert left == ([said] if said else [])


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
