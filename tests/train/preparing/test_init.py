"""`lora-adapters init` on folders of different trouble: what it says, and that the trainer takes what it writes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_adapters import cli
from lora_adapters.convert.parsing import toml_table
from lora_adapters.train.data.config import DatasetConfig
from lora_adapters.train.models.registry import FAMILIES
from lora_adapters.train.options.arguments import parse
from lora_adapters.train.options.option import options_of
from lora_adapters.train.options.settings import Settings
from lora_adapters.train.preparing.presets import Preset, presets
from lora_adapters.train.training.setup import prepare

from ..transformers import build_flux, build_sd3

ORIENTATION = 0x0112


def block_image(size: tuple[int, int], seed: int) -> Image.Image:
    """An image that looks like no other: blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def fill(folder: Path, sizes, ending: str = ".jpg", **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        block_image(size, number).save(folder / f"{number:04d}{ending}", **options)
    return folder


def init(capsys, folder: Path, model: Path, *words: str) -> str:
    out = folder.parent / "settings"
    given = ["init", str(folder), "--model", str(model), "--card", "0", "--out", str(out), *words]
    assert cli.main(given) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def taken(folder: Path, *words: str):
    """What the trainer makes of the files that were written."""
    config = folder.parent / "settings" / "config.toml"
    return prepare(parse([f"--config_file={config}", "--dry_run", *words]))


def written(folder: Path, name: str) -> dict:
    return toml_table((folder.parent / "settings" / name).read_text(encoding="utf-8"))


def test_phone_photos(sd1, tmp_path, capsys) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    folder = fill(tmp_path / "phone", [(400, 300)] * 3, exif=exif)
    block_image((400, 300), 9).save(folder / "wide.JPEG")
    for name in ("IMG_1.HEIC", "IMG_2.MOV", "Thumbs.db", ".DS_Store"):
        (folder / name).write_bytes(b"x")
    said = init(capsys, folder, sd1, "--class_tokens", "sks cat")
    assert "4 images\n" in said
    assert "3 portrait, 1 landscape" in said
    assert "3 are turned by their EXIF data" in said
    assert "no captions" in said
    assert "2 other files are not read: IMG_1.HEIC, IMG_2.MOV\n" in said
    assert "photos that have to be saved as JPEG or PNG to be trained on: IMG_1.HEIC\n" in said
    run = taken(folder)
    assert {image.origin.size for image in run.data.images.images} == {(300, 400), (400, 300)}
    assert {image.origin.caption for image in run.data.images.images} == {"sks cat"}
    assert (run.settings.learning_rate, run.settings.network_dim, run.settings.max_train_steps) == (1e-4, 16, 800)


def test_mixed_captions(sd1, tmp_path, capsys) -> None:
    folder = fill(tmp_path / "mixed", [(90, 90)] * 5, ".png")
    for number in range(3):
        (folder / f"{number:04d}.txt").write_text(f"number {number}\nmore")
    (folder / "0003.caption").write_text("another kind")
    (folder / "0002.txt").write_text("")
    said = init(capsys, folder, sd1)
    assert "3 have a .txt caption" in said
    assert "2 have none, and get class_tokens: 0003.png, 0004.png" in said
    assert "captions of other endings are not read (1 .caption): rename them to .txt" in said
    assert "1 captions are empty: 0002.png" in said
    assert "class_tokens = a photo: caption of 2 images that have none [a guess: give --class_tokens]" in said
    captions = [image.origin.caption for image in taken(folder).data.images.images]
    assert captions == ["number 0", "number 1", "", "a photo", "a photo"]
    prompts = (folder.parent / "settings" / "prompts.txt").read_text()
    assert "\nnumber 0 --w 64 --h 64 " in prompts


def test_corrupt_files_and_captions(sd1, tmp_path, capsys) -> None:
    folder = fill(tmp_path / "corrupt", [(90, 90)] * 3)
    whole = (folder / "0001.jpg").read_bytes()
    (folder / "0001.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    said = init(capsys, folder, sd1)
    assert "3 cannot be read, and are left out in training: 0001.jpg (" in said
    assert "empty.png (empty file), text.png (not an image)" in said
    assert len(taken(folder).data.images.images) == 2
    (folder / "0000.txt").write_bytes(b"\xff\xfe\x00")
    said = init(capsys, folder, sd1, "--overwrite")
    assert "training will stop at captions that are not text, correct them: 0000.txt (" in said


def test_tiny_images(sd1, tmp_path, capsys) -> None:
    folder = fill(tmp_path / "tiny", [(20, 20), (40, 24), (64, 64), (7, 9)], ".png")
    said = init(capsys, folder, sd1)
    assert "3 have fewer pixels than 64x64, and less detail: 0000.png, 0001.png, 0003.png" in said
    assert len(taken(folder).data.images.images) == 4
    (folder / "0003.png").unlink()
    said = init(capsys, folder, sd1, "--overwrite")
    assert "bucket_no_upscale = True: 2 images have fewer pixels than 64x64" in said
    buckets = {bucket for _, bucket in taken(folder).data.images.group_buckets}
    assert buckets == {(16, 16), (40, 24), (64, 64)}


def test_images_that_are_too_small_to_learn_from(sd1, tmp_path, capsys) -> None:
    said = init(capsys, fill(tmp_path / "stamps", [(20, 20), (31, 32), (64, 64)]), sd1)
    assert "most have less than a quarter of that: find larger ones, or enlarge them to 64 pixels" in said
    said = init(capsys, fill(tmp_path / "icons", [(20, 20), (32, 32), (64, 64)]), sd1, "--overwrite")
    assert "most have" not in said


def test_a_thousand_files(sd1, tmp_path, capsys) -> None:
    folder = fill(tmp_path / "many", [(30 + number % 40, 64) for number in range(997)], ".png")
    for number in range(3):
        (folder / f"again{number}.png").write_bytes((folder / f"{number:04d}.png").read_bytes())
    said = init(capsys, folder, sd1)
    assert "1000 images\n" in said
    assert "3 look like another one, and count more than once: 0000.png = again0.png; " in said
    assert len(said.splitlines()) < 40
    run = taken(folder)
    assert run.data.images.count(regularisation=False) == 900
    assert run.data.validation.num_images == 100


def test_folders_that_say_how_often(sd1, tmp_path, capsys) -> None:
    parent = tmp_path / "sets"
    fill(parent / "10_sks dog", [(80, 64)] * 2)
    fill(parent / "2024_holiday", [(64, 80)])
    said = init(capsys, parent, sd1)
    assert "its name says 10 repeats of sks dog" in said
    images = taken(parent).data.images
    assert images.count(regularisation=False) == 21
    assert {image.origin.caption for image in images.images} == {"sks dog", "a photo"}


def test_nothing_is_overwritten_unasked(sd1, tmp_path, capsys) -> None:
    folder = fill(tmp_path / "a b", [(80, 64)] * 2)
    init(capsys, folder, sd1)
    own = tmp_path / "settings" / "config.toml"
    own.write_text("# mine\n")
    (tmp_path / "settings" / "prompts.txt").unlink()
    given = ["init", str(folder), "--model", str(sd1), "--card", "0", "--out", str(tmp_path / "settings")]
    assert cli.main(given) == 1
    assert "already there: " in capsys.readouterr().err
    assert own.read_text() == "# mine\n"
    assert not (tmp_path / "settings" / "prompts.txt").exists()
    assert cli.main([*given, "--overwrite"]) == 0
    assert own.read_text() != "# mine\n"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--card", "0"], 2, "--model is missing"),
        (["--model", "someone/paintings", "--card", "8"], 2, "--family is missing: someone/paintings may be"),
        (["--model", "a/sdxl-base", "--card", "4"], 2, "--card 4: sdxl needs 8 GB; 0 trains without a GPU"),
        (["--model", "a/sdxl-base", "--preset", "stile"], 2, "(did you mean style?)"),
        (["--model", "a/sdxl-base", "--preset", "style"], 2, "add a preset for a machine"),
        (["--model", "nothere.safetensors", "--card", "8"], 1, "does not exist"),
        (["--model", "a/sdxl-base", "--card", "-1"], 2, "--card must be at least 0"),
    ],
)
def test_what_cannot_be_right(tmp_path, capsys, words, status, message) -> None:
    folder = fill(tmp_path / "few", [(80, 64)])
    assert cli.main(["init", str(folder), "--out", str(tmp_path / "out"), *words]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_without_images(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("x")
    fill(tmp_path / "deep" / "a" / "b", [(64, 64)])
    assert cli.main(["init", str(tmp_path / "deep"), "--model", "a/sdxl"]) == 1
    deep = tmp_path / "deep" / "a" / "b"
    assert f"has no images in it or in its folders, but further down: name one of {deep}" in capsys.readouterr().err
    for name, message in {"none": "does not exist", "empty": "has no images", "bad": "none of its images"}.items():
        assert cli.main(["init", str(tmp_path / name), "--model", "a/sdxl"]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "card", "machine"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 8, "sd15-8gb"),
        ("stabilityai/stable-diffusion-2-1", 11, "sd15-8gb"),
        ("stabilityai/stable-diffusion-xl-base-1.0", 24, "sdxl-24gb"),
        ("cagliostrolab/animagine-xl-3.1", 80, "sdxl-24gb"),
        ("stabilityai/stable-diffusion-xl-base-1.0", 12, "sdxl-12gb"),
        ("black-forest-labs/FLUX.1-dev", 16, "flux-12gb"),
        ("black-forest-labs/FLUX.1-schnell", 24, "flux-24gb"),
        ("stabilityai/stable-diffusion-3.5-medium", 12, "sd3-12gb"),
    ],
)
def test_the_preset_of_a_model_and_a_card(tmp_path, capsys, model, card, machine) -> None:
    folder = fill(tmp_path / "few", [(80, 64)])
    out = tmp_path / "settings"
    assert cli.main(["init", str(folder), "--model", model, "--card", str(card), "--out", str(out)]) == 0
    assert f"from the presets {machine}, subject" in capsys.readouterr().out
    options = written(folder, "config.toml")
    large = "sd15" not in machine
    assert options["gradient_checkpointing"] if large else "gradient_checkpointing" not in options
    assert written(folder, "dataset.toml")["general"]["resolution"] == (1024 if large else 512)
    assert ("min_snr_gamma" in options) == machine.startswith(("sd15", "sdxl"))


def test_sdxl_settings_are_taken(sdxl, tmp_path, capsys) -> None:
    folder = fill(tmp_path / "few", [(80, 64)] * 2)
    init(capsys, folder, sdxl, "--purpose", "style")
    run = taken(folder)
    assert run.settings.cache_text_encoder_outputs
    assert set(run.trained) == {"unet"}
    assert run.settings.network_module == "networks.dylora"


@pytest.mark.parametrize("build", [build_flux, build_sd3])
def test_transformers_settings_are_taken(tmp_path, capsys, build) -> None:
    model = build(tmp_path / "model")
    folder = fill(tmp_path / "few", [(80, 64)] * 2)
    init(capsys, folder, model, "--card", "0")
    run = taken(folder, "--resolution=64", "--bucket_reso_steps=16")
    assert run.settings.cache_text_encoder_outputs
    assert set(run.trained) == {"transformer"}
    assert run.settings.min_snr_gamma is None
    if build is build_sd3:  # its config says the side, 64 pixels
        assert written(folder, "dataset.toml")["general"]["bucket_reso_steps"] == 16


@pytest.mark.parametrize("preset", presets().values(), ids=lambda preset: preset.name)
def test_presets_are_options_with_reasons(preset: Preset) -> None:
    known, tables = options_of(Settings), options_of(DatasetConfig)
    assert set(preset.options) <= set(known)
    assert set(preset.dataset) <= set(tables)
    assert (preset.card is None) == (preset.family is None) == (preset.purpose is not None)
    assert preset.family is None or preset.family in FAMILIES
    for choice in (*preset.options.values(), *preset.dataset.values()):
        assert choice.why
        assert choice.source


def test_names_of_any_kind(sd1, tmp_path, capsys) -> None:
    """A folder's name with quotes, a line break and a comment sign comes through the files' syntax."""
    name = 'it\'s "my" #1\nfolder'
    folder = fill(tmp_path / name, [(80, 64)])
    (folder / "0000.txt").write_text("# a --w 5 cat")
    init(capsys, folder, sd1)
    assert taken(folder).data.images.images[0].origin.caption == "# a --w 5 cat"
    assert "\na w 5 cat --w 64" in (tmp_path / "settings" / "prompts.txt").read_text()
