import random

import pytest

from lora_adapters.convert import portable
from lora_adapters.train.errors import TrainingError
from lora_adapters.train.generation.options import parse
from lora_adapters.train.generation.requests import ImageRequest, requests


def made(lines: list[str], *options: object, starts=()) -> list[ImageRequest]:
    settings = parse([*map(str, options)])
    return requests(settings, [(line, f"line {n}") for n, line in enumerate(lines, 1)], starts)


def seeds(lines: list[str], *options: object) -> list[int]:
    return [one.seed for one in made(lines, *options)]


def test_a_line_with_everything() -> None:
    line = ("a cat --w 64 --h 72 --s 9 --d 3 --l 2.5 --n bad --am 0.5,-1 --rank 4 --ss euler --f a.png "
            "--ow 1 --oh 2 --nw 3 --nh 4 --ct 5 --cl 6")  # fmt: skip
    assert made([line]) == [
        ImageRequest(
            "a cat", "line 1", 3, 9, 2.5, "euler", "bad", 64, 72, None, None, (0.5, -1.0), 4, 1, 2, 3, 4, 5, 6, "a.png"
        )
    ]


def test_defaults_are_those_of_the_command_line() -> None:
    one = made(["a"], "--steps", 9, "--scale", 2, "--sampler", "lms", "--W", 64, "--H", 72, "--crop_top", 5)[0]
    assert (one.steps, one.scale, one.sampler, one.width, one.height, one.crop_top) == (9, 2.0, "lms", 64, 72, 5)
    plain = made(["a"])[0]
    assert (plain.steps, plain.scale, plain.sampler, plain.width, plain.negative_prompt) == (
        50,
        None,
        "ddim",
        None,
        "",
    )  # None: the family's


def test_sizes_are_rounded_down_to_multiples_of_8(caplog) -> None:
    one, other = made(["a --w 79 --h 3", "b"], "--W", 100, "--H", 64)
    assert (one.width, one.height, other.width, other.height) == (72, 8, 96, 64)
    for said in (
        "line 1: 79 pixels: sides must be multiples of 8; 72 is used",
        "line 1: 3 pixels",
        "--W, --H: 100 pixels",
    ):
        assert said in caplog.text


def test_one_image_has_the_seed_itself_and_several_have_kohyas() -> None:
    assert seeds(["a"], "--seed", 7) == [7]
    draw = random.Random(7)
    assert seeds(["a", "b"], "--seed", 7, "--images_per_prompt", 2) == [draw.randint(0, 2**32 - 1) for _ in range(4)]
    assert seeds(["a"]) != seeds(["a"])


def test_seeds_of_a_line_count_on() -> None:
    options = ("--images_per_prompt", 3)
    assert seeds(["a --d 9", "b --d 1, 5", "c --d 4294967295"], *options) == [9, 10, 11, 1, 5, 6, 2**32 - 1, 0, 1]


def test_the_same_seed_for_all_prompts() -> None:
    found = seeds(["a", "b --d 3", "c"], "--iter_same_seed", "--images_per_prompt", 2, "--n_iter", 2)
    first, second = found[0], found[6]
    expected = [first, first + 1, 3, 4, first, first + 1, second, second + 1, 3, 4, second, second + 1]
    assert found == [one % 2**32 for one in expected]
    assert first != second


def test_rounds_and_their_order() -> None:
    lines = [str(n) for n in range(20)]
    plain = [one.prompt for one in made(lines, "--n_iter", 2)]
    assert plain == lines * 2
    mixed = [one.prompt for one in made(lines, "--n_iter", 2, "--shuffle_prompts", "--seed", 1)]
    assert sorted(mixed[:20]) == sorted(mixed[20:]) == sorted(lines)
    assert mixed[:20] != mixed[20:]
    assert mixed == [one.prompt for one in made(lines, "--n_iter", 2, "--shuffle_prompts", "--seed", 1)]


def test_initial_images_are_taken_in_turn(tmp_path) -> None:
    starts = [tmp_path / "1.png", tmp_path / "2.png"]
    found = made(["a", "b --t 0.3", "c"], starts=starts)
    assert [(one.start, one.strength) for one in found] == [(starts[0], 0.8), (starts[1], 0.3), (starts[0], 0.8)]


def test_one_name_for_several_images() -> None:
    assert [one.file for one in made(["a --f x.png"], "--images_per_prompt", 3)] == ["x.png", "x-2.png", "x-3.png"]
    with pytest.raises(TrainingError, match=r"line 1: the name x.png is taken already \(line 1\)"):
        made(["a --f x.png"], "--n_iter", 2)


def test_names_that_windows_does_not_take_or_takes_for_one(monkeypatch) -> None:
    monkeypatch.setattr(portable, "WINDOWS", False)
    monkeypatch.setattr("sys.platform", "linux")
    assert [one.file for one in made(["a --f a:b.png", "a --f A.png", "a --f a.png"])] == ["a:b.png", "A.png", "a.png"]
    monkeypatch.setattr(portable, "WINDOWS", True)
    for name, said in {
        "a:b.png": "Windows does not allow ':' in names",
        "con": "does not allow the name 'con'",
    }.items():
        with pytest.raises(TrainingError, match=f"line 1: --f {name}: .*{said}"):
            made([f"a --f {name}"])
    with pytest.raises(TrainingError, match=r"line 2: the name a\.png is taken already"):
        made(["a --f A.png", "a --f a.png"])
