"""Names, paths and consoles of Linux, macOS and Windows."""

import io
import sys

import pytest

from lora_adapters.convert import portable


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("plain name-1.2", "plain name-1.2"),
        ('a<b>c:d"e/f\\g|h?i*j', "a_b_c_d_e_f_g_h_i_j"),
        ("tab\tnewline\n", "tab_newline_"),
        ("dots... ", "dots"),
        (" .", "_"),
        ("", "_"),
        ("NUL", "_NUL"),
        ("com1.safetensors", "_com1.safetensors"),
        ("console", "console"),
        ("画家", "画家"),
    ],
)
def test_any_text_becomes_a_name_that_every_system_takes(text, name):
    assert portable.file_name(text) == name
    assert portable.file_name(name) == name


def test_names_are_forbidden_on_windows_only(monkeypatch):
    monkeypatch.setattr(portable, "WINDOWS", False)
    names = ("a:b", "nul", "a.", "a?b")
    assert [portable.forbidden(name) for name in names] == [None] * 4
    monkeypatch.setattr(portable, "WINDOWS", True)
    assert portable.forbidden("a:b") == "Windows does not allow ':' in names"
    assert all(portable.forbidden(name) for name in names)
    assert portable.forbidden("x/nul.png") == "Windows does not allow the name 'nul.png'"
    assert portable.forbidden("a b.c") is portable.forbidden("x/y.png") is portable.forbidden("") is None


def test_names_that_differ_in_case_are_one_file_on_windows(monkeypatch):
    monkeypatch.setattr(portable, "WINDOWS", False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert portable.same_file_key("A.png") != portable.same_file_key("a.png")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert portable.same_file_key("A.png") == portable.same_file_key("a.png")


def test_a_console_without_a_letter_prints_its_number(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    portable.tolerant_console()
    print("é 猫 →", end="")
    console.flush()
    assert console.buffer.getvalue() == b"\xe9 \\u732b \\u2192"
