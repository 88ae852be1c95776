import math

import pytest

from lora_adapters.convert.parsing import decoded, json_value, number, read_text, toml_table


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity", "1e999", "one", ""])
def test_only_finite_numbers_are_numbers(text):
    with pytest.raises(ValueError, match=r"not a finite number|could not convert"):
        number(text)
    assert number("-1.5e-3") == -0.0015


@pytest.mark.parametrize("digits", ["1" + 400 * "0", str(2**64), str(-(2**63) - 1), 5000 * "9"])
def test_no_whole_number_is_longer_than_64_bits(digits):
    with pytest.raises(ValueError, match=r"64 bits|limit") as caught:
        json_value(f'{{"a": [{digits}]}}')
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"64 bits|limit"):
        toml_table(f"a = [{{ b = {digits} }}]")


def test_hexadecimal_numbers_of_any_length_are_counted():
    with pytest.raises(ValueError, match="64 bits"):
        toml_table("a = 0x" + 5000 * "f")
    assert toml_table("a = 0xffffffffffffffff")["a"] == 2**64 - 1
    assert json_value(str(-(2**63))) == -(2**63)
    assert math.isinf(toml_table("a = inf")["a"])


SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"  # all of which str.splitlines would split at


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_in_each_encoding_and_only_line_ends_end_lines(tmp_path, encoding):
    file = tmp_path / "a.txt"
    file.write_bytes(f"{SEPARATORS} \u732b\r\ntwo\rthree\nfour\r\n".encode(encoding))
    assert read_text(file).split("\n") == [f"{SEPARATORS} \u732b", "two", "three", "four", ""]
    for order, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        assert decoded(mark + "caf\xe9".encode(order)) == "caf\xe9"
    assert decoded(b"") == decoded(b"\xef\xbb\xbf") == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9", "not UTF-8 at byte 3; save the file as UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9", "not UTF-8 at byte 6; save the file as UTF-8"),
        (b"\xff\xfea\0b", "not UTF-16 at byte 4; save the file as UTF-8"),
        ("cat".encode("utf-16-le"), r"a NUL at byte 1 \(UTF-16 needs a byte order mark\)"),
        ("a\0".encode("utf-16"), "a NUL at byte 4 "),
        ("cat".encode("utf-32"), "text in UTF-32"),
    ],
)
def test_what_is_no_text_is_named_by_its_byte(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        decoded(data)
    assert "\n" not in str(caught.value)


def test_a_toml_path_in_double_quotes_is_explained():
    for text in (r'a = 1\nb = "C:\Users"', r'b = "D:\data\x"', r'b = "C:\new\table"', r'b = ["C:\train"]'):
        with pytest.raises(ValueError, match="write the path in single quotes"):
            toml_table(text.replace("= 1\\n", "= 1\n"))
    assert toml_table(r"""b = 'C:\new'""") == {"b": r"C:\new"}
    assert toml_table(r'b = "C:\\new"') == {"b": r"C:\new"}
    assert toml_table(r'b = "note: a\tb"') == {"b": "note: a\tb"}
    assert toml_table(r'b = "A: one\nB: two"') == {"b": "A: one\nB: two"}
    with pytest.raises(ValueError, match="line 1") as caught:
        toml_table(r'b = "x\\" y')
    assert "single quotes" not in str(caught.value)


def test_a_json_path_with_single_backslashes_is_explained():
    for text in (r'{"a": "C:\Users"}', r'{"a": "D:\data"}'):
        with pytest.raises(ValueError, match=r"escape: line 1 column .*; in paths write \\\\ or / for a backslash"):
            json_value(text)
    assert json_value(r'{"a": "C:\\Users"}') == {"a": r"C:\Users"}
