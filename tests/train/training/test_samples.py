from pathlib import Path

import pytest
from PIL import Image

from lora_adapters.train.errors import TrainingError
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.training.samples import Prompt, check_samples, grid, read_prompts, spread, wants_samples

FULL = Prompt("a red disc", "bad", 64, 128, 12, 4.5, 7, "euler_a")


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_prompts_of_a_text_file(tmp_path) -> None:
    text = "# comment\n\na red disc --n bad --w 64 --h 128 --s 12 --l 4.5 --d 7 --ss euler_a\na well-known -- dash\n"
    assert read_prompts(written(tmp_path, "p.txt", text)) == [FULL, Prompt("a well-known -- dash")]


def test_prompts_of_toml_and_json(tmp_path) -> None:
    toml = """[prompt]
negative_prompt = "bad"
width = 64
[[prompt.subset]]
prompt = "a red disc"
height = 128
sample_steps = 12
scale = 4.5
seed = 7
sample_sampler = "euler_a"
[[prompt.subset]]
prompt = "a blue square"
"""
    assert read_prompts(written(tmp_path, "p.toml", toml)) == [FULL, Prompt("a blue square", "bad", 64)]
    json = '[{"prompt": "a red disc", "width": 64}]'
    assert read_prompts(written(tmp_path, "p.json", json)) == [Prompt("a red disc", width=64)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "# nothing", "has no prompts"),
        ("p.json", "[{", "p.json: "),
        ("p.json", "[1]", "1 has no prompt"),
        ("p.json", '[{"prompt": 1}]', "has no prompt"),
        ("p.toml", "[prompt", "p.toml: "),
    ],
)
def test_wrong_prompt_files(tmp_path, name, text, message) -> None:
    with pytest.raises(TrainingError, match=message):
        read_prompts(written(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "text", "prompt", "message"),
    [
        ("p.txt", "x --w many", {}, "p.txt, line 1: --w many: it takes a whole number; ignored"),
        ("p.txt", "# a comment\n\nx --q 1", {}, "p.txt, line 3: --q in 'x --q 1' is not one of"),
        ("p.txt", "x --w 65", {"width": 64}, "line 1: 65 pixels: sides must be multiples of 8; 64 is used"),
        ("p.txt", f"x --d {2**64}", {}, f"line 1: seeds are 0 to {2**64 - 1}, not {2**64}; ignored"),
        ("p.txt", "x --l nan", {}, "--l nan: it takes a number; ignored"),
        ("p.txt", "x --ss fast", {}, "unknown sampler fast, --sample_sampler is used"),
        ("p.json", '[{"prompt": "x", "scale": Infinity}]', {}, "scale cannot be inf; ignored"),
        ("p.json", '[{"prompt": "x", "size": 1}]', {}, "size is not one of"),
        ("p.json", '["x --w 64 --g 3"]', {"width": 64}, "p.json: --g in"),
        ("p.toml", "[prompt]\nheight = 70\n[[prompt.subset]]\nprompt = 'x'", {"height": 64}, "70 pixels"),
    ],
)
def test_options_of_a_prompt_that_cannot_be_read_are_left_out(tmp_path, name, text, prompt, message) -> None:
    said: list[str] = []
    assert read_prompts(written(tmp_path, name, text), said.append) == [Prompt("x", **prompt)]
    assert len(said) == 1
    assert message in said[0]


def test_prompts_without_surprises_are_read_in_silence(tmp_path) -> None:
    said: list[str] = []
    prompts = read_prompts(written(tmp_path, "p.txt", "x --n --s 28.0\nx\u2028y --d 1"), said.append)
    assert prompts == [Prompt("x", sample_steps=28), Prompt("x\u2028y", seed=1)]
    assert not said


def test_a_negative_seed_is_the_run_s(tmp_path) -> None:
    """Other programs' -1 asks for any seed."""
    assert read_prompts(written(tmp_path, "p.json", '[{"prompt": "x", "seed": -1}]')) == [Prompt("x")]


def test_samples_need_prompts_and_an_occasion(tmp_path, caplog) -> None:
    assert not wants_samples(settings(sample_every_n_steps=1))
    check_samples(settings(sample_every_n_steps=1))
    with pytest.raises(TrainingError, match="cannot be read"):
        check_samples(settings(sample_every_n_steps=1, sample_prompts="nowhere.txt"))
    check_samples(settings(sample_prompts="nowhere.txt"))  # as kohya's GUI leaves it: said, and no error
    assert "no images will be drawn without --sample_every_n_steps" in caplog.text


def test_a_sampler_that_cannot_start_from_pure_noise_is_refused_before_training(tmp_path) -> None:
    prompts = written(tmp_path, "p.txt", "x --ss pndm")
    check_samples(settings(sample_every_n_steps=1, sample_prompts=prompts))
    with pytest.raises(TrainingError, match="pndm does not support --zero_terminal_snr; use one of ddim, euler"):
        check_samples(settings(sample_every_n_steps=1, sample_prompts=prompts, zero_terminal_snr=True))


def test_ranks_are_spread_evenly_with_the_highest() -> None:
    assert spread([4, 8, 12, 16], 4) == [4, 8, 12, 16]
    assert spread(list(range(1, 17)), 4) == [4, 8, 12, 16]
    assert spread(list(range(1, 11)), 3)[-1] == 10


def test_grid() -> None:
    colours = [["red", "green", "blue"], ["white", "black", "gray"]]
    sheet = grid([[Image.new("RGB", (8, 8), colour) for colour in row] for row in colours])
    assert sheet.size == (3 * 12 - 4, 2 * 12 - 4)
    assert [sheet.getpixel((x, 16)) for x in (0, 12, 24)] == [(255, 255, 255), (0, 0, 0), (128, 128, 128)]
