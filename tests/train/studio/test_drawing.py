"""Compare's images are those of `lora-adapters generate`, and of the Python that it shows."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_adapters import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.deltas.hadamard import Hadamard
from lora_adapters.convert.errors import OneLineError
from lora_adapters.convert.formats.metadata import DyLora
from lora_adapters.train.gen_img_diffusers import main as generate
from lora_adapters.train.studio.compare import Axis, Scene, Slot, cells
from lora_adapters.train.studio.drawing import Artist
from tests.train.generating import adapter_for, differ, pixels

from ..transformer_files import flux_files
from ..transformers import build_flux, build_sd3

ROUNDING = 1  # of 255: adapters that were exchanged on a model are added up in another order


@pytest.fixture(scope="module")
def files(sd1, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return (
        str(adapter_for(sd1, folder / "plain.safetensors", seed=1)),
        str(adapter_for(sd1, folder / "dial.safetensors", seed=2, dylora=DyLora(unit=1))),
    )


@pytest.fixture
def artist(sd1, tmp_path):
    return Artist([f"--ckpt={sd1}"], tmp_path / "drawn")


def scene(files, **changes):
    plain, dial = files
    slots = (Slot(plain, 0.7, blocks="MIDD"), Slot(dial, -0.5, rank=2))
    return Scene(**{"prompt": "a red disc", "negative": "blue", "seed": 3, "steps": 2, "slots": slots, **changes})


def generated(scene, sd1, folder):
    assert generate([*scene.words([f"--ckpt={sd1}"]), f"--outdir={folder}"]) == 0
    return pixels(next(folder.iterdir()))


def test_an_image_is_that_of_the_command_line_whatever_was_drawn_before(artist, files, sd1, tmp_path):
    wanted = scene(files)
    others = [scene(files, slots=()), scene(files, slots=(Slot(files[1], 1.0),)), scene(files, seed=4)]
    others.append(scene(files, slots=(wanted.slots[0], Slot(files[1], 0.9, rank=1))))  # only numbers differ
    images = [pixels(artist.draw(each)) for each in [*others, wanted]]
    assert differ(images[-1], generated(wanted, sd1, tmp_path / "program")) <= ROUNDING
    assert all(differ(images[-1], other) > 8 for other in images[:-1])
    text = Image.open(artist.draw(wanted)).info["parameters"]
    assert "<lora:plain:0.7> <lora:dial:-0.5>" in text
    assert 'Lora ranks: "dial: 2"' in text


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_the_python_draws_the_same(artist, files, sd1, tmp_path, monkeypatch, sampler):
    wanted = scene(files, sampler=sampler, width=64, height=48)
    drawn = pixels(artist.draw(wanted))
    monkeypatch.chdir(tmp_path)
    exec(artist.code([[wanted]]), {})
    assert differ(drawn, pixels(tmp_path / "image.png")) <= ROUNDING


def test_a_grid_has_the_images_of_its_cells(artist, files, sd1):
    wanted = scene(files, negative="")
    told = []
    grid = artist.draw_grid(
        wanted,
        Axis.of("blocks of adapter 1", "ALL; INS"),
        Axis.of("rank of adapter 2", "1, 4"),
        lambda *n: told.append(n),
    )
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    sheet = np.asarray(Image.open(grid).convert("RGB"), int)
    slot, dial = wanted.slots
    for row, rank in enumerate((1, 4)):
        for column, blocks in enumerate(("ALL", "INS")):
            slots = (Slot(slot.source, slot.weight, blocks=blocks), Slot(dial.source, dial.weight, rank=rank))
            cell = Image.open(artist.draw(scene(files, negative="", slots=slots)))
            cell = np.asarray(cell.resize((128, 128), Image.Resampling.BICUBIC).convert("RGB"), int)
            top = sheet.shape[0] - (2 - row) * 132
            left = sheet.shape[1] - (2 - column) * 132
            assert differ(sheet[top : top + 128, left : left + 128], cell) <= ROUNDING
    assert "blocks of adapter 1: ALL, INS; rank of adapter 2: 1, 4" in Image.open(grid).info["parameters"]


def test_an_adapter_that_does_not_fit_leaves_nothing_behind(artist, files, tmp_path):
    module = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    wide = Adapter({module: LowRank(torch.ones(2, 1280), torch.ones(1280, 2), 2.0)}).save(tmp_path / "wide.safetensors")
    alone = scene(files, slots=scene(files).slots[:1])
    before = pixels(artist.draw(alone))
    with pytest.raises(AdapterError, match=r"wide\.safetensors"):
        artist.draw(scene(files, slots=(*alone.slots, Slot(str(wide)))))
    assert differ(before, pixels(artist.draw(alone))) <= ROUNDING


def test_the_python_of_a_grid_draws_its_cells(artist, files, tmp_path, monkeypatch):
    rows = cells(scene(files), Axis.of("blocks of adapter 1", "ALL; OUTD"), Axis.of("scale", "2, 7"))
    drawn = [pixels(artist.draw(each)) for row in rows for each in row]
    monkeypatch.chdir(tmp_path)
    exec(artist.code(rows), {})
    for number, image in enumerate(drawn, start=1):
        assert differ(image, pixels(tmp_path / f"image-{number:03d}.png")) <= ROUNDING


def test_other_kinds_of_adapters_come_and_go(artist, files, sd1, tmp_path):
    draw = torch.Generator().manual_seed(0)
    modules = {}
    for module, pair in Adapter.load(files[0]).modules.items():
        out, into = pair.up.shape[0], pair.down.shape[1]
        parts = [torch.randn(*size, generator=draw) for size in ((out, 2), (2, into), (out, 2), (2, into))]
        modules[module] = Hadamard(*parts, alpha=2.0)
    loha = Adapter(modules).save(tmp_path / "loha.safetensors")
    alone = scene(files, slots=scene(files).slots[1:])
    before = pixels(artist.draw(alone))
    wanted = scene(files, slots=(Slot(str(loha), 0.3, blocks="MIDD"), *alone.slots))
    drawn = pixels(artist.draw(wanted))
    assert differ(drawn, generated(wanted, sd1, tmp_path / "program")) <= ROUNDING
    assert differ(drawn, before) > 8
    assert differ(before, pixels(artist.draw(alone))) <= ROUNDING


@pytest.mark.parametrize("build", [build_flux, build_sd3])
def test_transformers_are_drawn_as_on_the_command_line_and_in_python(build, tmp_path, monkeypatch):
    model = build(tmp_path / "model")
    family = "flux1" if build is build_flux else "medium"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    module = ModuleName("transformer", "transformer_blocks.0.attn.to_v")
    file = Adapter({module: LowRank(down, up, 4.0)}, {"ss_base_model_version": family}).save(tmp_path / "a.safetensors")
    slots = (Slot(str(file), 0.7, blocks="D00" if family == "flux1" else "J00"),)
    wanted = Scene("a red disc", seed=3, steps=2, scale=3.0, width=64, height=64, slots=slots)
    artist = Artist([f"--ckpt={model}"], tmp_path / "drawn")
    drawn = pixels(artist.draw(wanted))
    assert differ(drawn, generated(wanted, model, tmp_path / "program")) <= ROUNDING
    monkeypatch.chdir(tmp_path)
    exec(artist.code([[wanted]]), {})
    assert differ(drawn, pixels(tmp_path / "image.png")) <= ROUNDING


def test_the_python_of_a_model_in_files_of_parts_draws_the_same(tmp_path, monkeypatch):
    files = flux_files(build_flux(tmp_path / "model"), tmp_path / "files")
    words = [f"--{name}={value}" for name, value in files.items() if name != "pretrained_model_name_or_path"]
    wanted = Scene("a red disc", seed=3, steps=2, scale=3.0, width=64, height=64)
    artist = Artist([f"--ckpt={files['pretrained_model_name_or_path']}", *words], tmp_path / "drawn")
    drawn = pixels(artist.draw(wanted))
    monkeypatch.chdir(tmp_path)
    exec(artist.code([[wanted]]), {})
    assert differ(drawn, pixels(tmp_path / "image.png")) <= ROUNDING


def test_block_sliders_are_those_of_the_adapters_family(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page"))
    from lora_adapters.train.studio.compare_tab import CompareTab

    for family, labels in (("flux", ["BASE", "D00", "S37"]), ("sd3", ["BASE", "J00", "J37"]), ("sd", ["BASE", "IN01"])):
        updates = CompareTab._sliders(None, family, "")
        shown = [one.label for one in updates if one.visible]
        assert [label for label in labels if label in shown] == labels
        assert len({len(CompareTab._sliders(None, name, "")) for name in ("flux", "sd3", "sd")}) == 1


def test_offloaded_models_draw_the_same_and_exchange_their_adapters(files, sd1, tmp_path, monkeypatch):
    """From the CPU to the CPU: `Artist` calls what `lora-adapters generate` calls."""
    monkeypatch.setattr("lora_adapters.train.studio.drawing.check_offload", lambda *_: None)
    offloaded = Artist([f"--ckpt={sd1}", "--offload=model"], tmp_path / "drawn")
    wanted = scene(files)
    images = [pixels(offloaded.draw(each)) for each in (scene(files, slots=()), wanted)]
    assert all(hasattr(offloaded._pipe.components[name], "_hf_hook") for name in ("unet", "vae", "text_encoder"))
    assert differ(images[1], generated(wanted, sd1, tmp_path / "program")) <= ROUNDING
    assert differ(*images) > 8
    code = offloaded.code([[wanted]])
    assert "\npipe.enable_model_cpu_offload()\n" in code
    assert ".to(" not in code


def test_offloading_needs_a_device(files, sd1, tmp_path):
    with pytest.raises(OneLineError, match="--offload needs a cuda or mps device"):
        Artist([f"--ckpt={sd1}", "--offload=model"], tmp_path / "drawn").draw(scene(files))
