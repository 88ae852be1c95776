"""Scenes, block weights, grids and what is merged."""

import pytest
import torch

from lora_adapters import Adapter, AdapterError
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.train.generation.options import parse
from lora_adapters.train.studio import compare
from lora_adapters.train.studio.compare import Axis, Choice, Scene, Slot, cells
from lora_adapters.train.studio.paths import Folders, StudioError
from tests.train.generating import adapter_for

SLOTS = (Slot("a.safetensors", 0.5, blocks="MIDD"), Slot("b.safetensors", -1.0, rank=4))


def test_the_words_are_read_as_they_were_meant():
    scene = Scene("-a cat (big:1.2)", "blurry", 7, 12, 4.5, "euler_a", 64, 128, SLOTS)
    words = scene.words(["--ckpt=model"])
    read = parse(words)
    assert read.prompt == "-a cat (big:1.2) --n blurry"
    assert (read.seed, read.steps, read.scale, read.sampler, read.W, read.H) == (7, 12, 4.5, "euler_a", 64, 128)
    assert read.network_weights == ["a.safetensors:lbw=MIDD", "b.safetensors"]
    assert read.network_mul == [0.5, -1.0]
    assert read.network_args == ["", "rank=4"]
    assert parse(Scene("a").words(["--ckpt=model"])).network_weights is None


def test_options_do_not_hide_in_a_prompt():
    for text in ("a cat --f ../x.png", "--w 8"):
        with pytest.raises(StudioError, match="are not supported in prompts; use the fields"):
            Scene(text)
    assert Scene("a cat -- or a dog").prompt


def test_block_weights_as_sliders():
    names = compare.labels("sd")
    assert len(names) == 26
    assert names[0] == "BASE"
    values = dict(zip(names, compare.block_values("IN02 OUT11", "sd"), strict=True))
    assert {name for name, value in values.items() if value} == {"IN02", "OUT11"}
    assert compare.block_values("", "sd") == [1.0] * 26
    assert len(compare.block_values("MIDD", "sdxl")) == len(compare.labels("sdxl")) == 20
    numbers = [0.25 * n for n in range(26)]
    assert compare.block_values(compare.block_text(numbers), "sd") == numbers
    assert compare.block_text([1.0] * 26) == ""
    for preset in compare.PRESETS:
        assert set(compare.block_values(preset, "sd")) <= {0.0, 1.0}
    with pytest.raises(StudioError, match="for sdxl"):
        compare.block_values(compare.block_text([0.5] * 20), "sd")
    with pytest.raises(AdapterError, match="not a block or preset"):
        compare.block_values("IN99", "sd")


def test_a_grid_over_any_two():
    scene = Scene("a cat", slots=SLOTS)
    for name in compare.axes(2):
        assert compare.hint(name)
    rows = cells(scene, Axis.of("weight of adapter 2", "0, 0.5 1"), Axis.of("prompt", "a dog\n\na big, red cat\n"))
    assert [[(cell.prompt, cell.slots[1].weight) for cell in row] for row in rows] == [
        [("a dog", 0.0), ("a dog", 0.5), ("a dog", 1.0)],
        [("a big, red cat", 0.0), ("a big, red cat", 0.5), ("a big, red cat", 1.0)],
    ]
    assert all(cell.slots[0] == SLOTS[0] for row in rows for cell in row)
    rows = cells(scene, Axis.of("blocks of adapter 1", "ALL; 1,0.5,1,1,1,1,1,1,1,1,1,1; IN02"), None)
    assert [cell.slots[0].blocks for cell in rows[0]] == ["ALL", "1,0.5,1,1,1,1,1,1,1,1,1,1", "IN02"]
    assert [cell.seed for cell in cells(scene, Axis.of("seed", "1,2,2"), None)[0]] == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("seed", "", "give its values, such as 1, 2, 3"),
        ("seed", "1, x", "seed is 'x': give values such as 1, 2, 3"),
        ("weight of adapter 1", "nan", "weight of adapter 1 is 'nan'"),
        ("weight of adapter 3", "1", "weight of adapter 3: only 2 adapters are chosen"),
        ("blocks of adapter 1", "IN77", "IN77 is not a block"),
        ("seed", ",".join(map(str, range(101))), "101 images"),
    ],
)
def test_what_no_grid_can_have(name, text, said):
    with pytest.raises(StudioError, match=said):
        cells(Scene("a", slots=SLOTS), Axis.of(name, text), None)


def test_labels_of_a_grid():
    assert Axis.of("weight of adapter 2", "0, 1").titles == ["weight 0\nadapter 2", "weight 1\nadapter 2"]
    assert Axis.of("seed", "4").titles == ["seed 4"]
    assert Axis.of("prompt", "a cat, big").titles == ["a cat, big"]


def test_both_directions_differ():
    axis = Axis.of("seed", "1, 2")
    with pytest.raises(StudioError, match="choose two"):
        cells(Scene("a"), axis, axis)


def test_the_command_of_each_cell():
    rows = cells(Scene("a cat"), Axis.of("seed", "1, 2"), Axis.of("steps", "3, 4"))
    lines = compare.command_lines(rows, ["--ckpt=my model"]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("lora-adapters generate '--ckpt=my model' '--prompt=a cat' --seed=1 --steps=4")


@pytest.fixture
def files(sd1, tmp_path):
    (tmp_path / "adapters").mkdir()
    plain = adapter_for(sd1, tmp_path / "adapters" / "plain.safetensors", seed=1)
    dial = adapter_for(sd1, tmp_path / "adapters" / "dial.safetensors", seed=2, rank=5, dylora=DyLora(unit=2))
    return str(plain), str(dial)


def test_the_ranks_of_a_dylora(files):
    assert compare.choice_of(files[0]) == Choice("sd")
    assert compare.choice_of(files[1]) == Choice("sd", (2, 4, 5))


def test_what_is_shown_is_merged(files, sd1, tmp_path):
    from lora_adapters.convert.merge_lora import main as merge
    from lora_adapters.convert.tools.block_weights import parse as blocks
    from lora_adapters.convert.tools.block_weights import weighted

    folders = Folders(str(sd1), tmp_path / "output", (tmp_path / "adapters",))
    scene = Scene("a", slots=(Slot(files[0], 0.5, blocks="IN01 BASE"), Slot(files[1], -2.0, rank=2)))
    words = compare.merge_words(scene, folders, "both", into_model=False, one_file=False)
    assert merge(words[1:]) == 0
    made = Adapter.load(tmp_path / "output" / "both.safetensors")
    plain, dial = (Adapter.load(file) for file in files)
    wanted = weighted(plain, blocks("IN01 BASE", rest=0.0)).scale(0.5) + dial.truncate(2).scale(-2.0)
    for module, change in wanted.modules.items():
        torch.testing.assert_close(made.modules[module].delta(), change.delta())
    words = compare.merge_words(scene, folders, "model", into_model=True, one_file=True)
    assert merge(words[1:]) == 0
    assert (tmp_path / "output" / "model.safetensors").is_file()
    with pytest.raises(StudioError, match="exists already"):
        compare.merge_words(scene, folders, "both", False, False)
    with pytest.raises(StudioError, match="no adapter to merge"):
        compare.merge_words(Scene("a"), folders, "x", False, False)
