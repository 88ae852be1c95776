import hashlib

import pytest
from PIL import Image

from lora_adapters.train.generation.png_info import parameters, prompts_in, read_text, save_options, short_hash
from tests.train.generating import web_ui_reads

FACTS = {"Steps": 20, "Sampler": "Euler a", "CFG scale": "7.5", "Lora hashes": 'a: 1, "b": 2\\'}


def test_the_form() -> None:
    text = parameters("a cat", "bad", [("one", 0.5), ("two", -1.0)], FACTS)
    assert text == (
        "a cat <lora:one:0.5> <lora:two:-1>\nNegative prompt: bad\n"
        'Steps: 20, Sampler: Euler a, CFG scale: 7.5, Lora hashes: "a: 1, \\"b\\": 2\\\\"'
    )
    assert web_ui_reads(text)["CFG scale"] == "7.5"
    assert parameters("a cat", "", [], {"Steps": 1}) == "a cat\nSteps: 1"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (parameters("a cat", "bad\nworse", [("one", 0.5)], FACTS), ("a cat", "bad\nworse")),
        (parameters("a\ncat", "", [], FACTS), ("a\ncat", "")),
        ("a cat\nSteps: 3", ("a cat\nSteps: 3", "")),  # no line of facts
    ],
)
def test_prompts_are_read_back(text, found) -> None:
    assert prompts_in(text) == found


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_images_keep_it(tmp_path, suffix) -> None:
    file = tmp_path / f"a{suffix}"
    Image.new("RGB", (8, 8), "red").save(file, **save_options("a 猫\nSteps: 3", suffix))
    assert read_text(file) == "a 猫\nSteps: 3"
    with Image.open(file) as image:
        assert image.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix]


def test_images_without_it(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    assert read_text(tmp_path / "a.jpg") is None


def test_the_hash(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    assert short_hash(tmp_path / "a") == hashlib.sha256(b"weights").hexdigest()[:10]
