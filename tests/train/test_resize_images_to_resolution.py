import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_adapters.convert import portable
from lora_adapters.train.resize_images_to_resolution import DEFAULT_RESOLUTIONS, main, resize_images
from lora_adapters.train.resizing.plan import ResizeError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train" / "resize_images_to_resolution.py"


@pytest.fixture
def src(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    return folder


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "new" / "dst"


def colour(size: tuple[int, int], fill: tuple[int, ...] = (200, 30, 60)) -> Image.Image:
    return Image.new("RGBA" if len(fill) == 4 else "RGB", size, fill)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def test_original_and_every_resolution_are_saved(src, dst):
    colour((800, 1200)).save(src / "tall.png")
    original = (src / "tall.png").read_bytes()
    summary = resize_images(src, dst, workers=1)
    assert names(dst) == [*(f"tall+{w}x{h}.jpg" for w, h in sorted(DEFAULT_RESOLUTIONS)), "tall.png"]
    assert (dst / "tall.png").read_bytes() == original
    # side · √(2/3) and side · √(3/2), rounded down; width and height are not swapped
    expected = {512: (418, 627), 384: (313, 470), 256: (209, 313), 128: (104, 156)}
    assert {side: size(dst / f"tall+{side}x{side}.jpg") for side in expected} == expected
    with Image.open(dst / "tall+128x128.jpg") as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image, int) - (200, 30, 60)).max() <= 2
    assert (summary.images, summary.resized, summary.kept, summary.copied) == (1, 4, 0, 1)


def test_pixels_come_from_the_right_place(src, dst):
    # Four quarters of a landscape image keep their places when both sides are halved.
    pixels = np.zeros((200, 800, 3), np.uint8)
    pixels[:100, :400], pixels[:100, 400:] = (250, 0, 0), (0, 250, 0)
    pixels[100:, :400], pixels[100:, 400:] = (0, 0, 250), (250, 250, 0)
    Image.fromarray(pixels).save(src / "a.png")
    assert run(src, dst, "--max_resolution", "400x100", "--save_as_png") == 0
    with Image.open(dst / "a+400x100.png") as image:
        assert np.array_equal(np.asarray(image), pixels[::2, ::2])


def test_each_resolution_starts_from_the_original(src, dst):
    Image.effect_noise((400, 300), 80).convert("RGB").save(src / "a.png")
    assert run(src, dst, "--max_resolution", "64x64,128x128,256x256", "--save_as_png") == 0
    assert [size(dst / f"a+{n}x{n}.png") for n in (64, 128, 256)] == [(73, 55), (147, 110), (295, 221)]
    assert run(src, dst.with_name("alone"), "--max_resolution", "128x128", "--save_as_png") == 0
    assert (dst / "a+128x128.png").read_bytes() == (dst.with_name("alone") / "a+128x128.png").read_bytes()


def test_nothing_is_enlarged(src, dst):
    colour((100, 60)).save(src / "a.png")
    assert run(src, dst, "--max_resolution", "512x512,50x50") == 0
    assert size(dst / "a+512x512.jpg") == (100, 60)
    assert size(dst / "a+50x50.jpg") == (64, 38)


def test_divisible_by_crops_the_centre_and_leaves_the_original(src, dst):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 101, 3), np.uint8)
    Image.fromarray(pixels).save(src / "a.png")
    assert run(src, dst, "--max_resolution", "512x512", "--divisible_by", "32", "--save_as_png") == 0
    with Image.open(dst / "a+512x512.png") as image:
        assert np.array_equal(np.asarray(image), pixels[3:67, 2:98])
    assert size(dst / "a.png") == (101, 70)
    colour((800, 1200)).save(src / "b.png")
    assert run(src, dst, "--max_resolution", "512x512", "--divisible_by", "64") == 0
    assert size(dst / "b+512x512.jpg") == (384, 576)


def test_a_size_below_divisible_by_is_left_out_and_named(src, dst, capsys):
    colour((300, 30)).save(src / "thin.png")
    (src / "thin.txt").write_text("thin")
    arguments = (src, dst, "--max_resolution", "512x512,64x64", "--divisible_by", "16", "--copy_associated_files")
    assert run(*arguments) == 0
    # 64 · √10 = 202.4 and 64 / √10 = 20.2: enough for 16; at 32 by 32 it would be 101 × 10
    assert size(dst / "thin+64x64.jpg") == (192, 16)
    assert run(src, dst, "--max_resolution", "32x32", "--divisible_by", "16", "--copy_associated_files") == 0
    assert "thin.png: 101x10 at 32x32 is less than divisible_by 16" in capsys.readouterr().err
    assert not [name for name in names(dst) if "32x32" in name]


def test_captions_go_with_their_images(src, dst):
    colour((90, 90)).save(src / "a.png")
    colour((90, 90)).save(src / "a.b.png")
    files = {"a.txt": "A", "a.caption": "C", "a.b.txt": "AB", "ab.txt": "other", "a.npz": "latents", "meta.json": "{}"}
    for name, text in files.items():
        (src / name).write_text(text)
    assert run(src, dst, "--max_resolution", "64x64,32x32", "--copy_associated_files") == 0
    found = {name: (dst / name).read_text() for name in names(dst) if Path(name).suffix not in (".png", ".jpg")}
    beside = {
        f"{stem}+{resolution}{suffix}": text
        for resolution in ("64x64", "32x32")
        for stem, suffix, text in (("a", ".txt", "A"), ("a", ".caption", "C"), ("a.b", ".txt", "AB"))
    }
    assert found == files | beside


def test_captions_of_resized_images_are_not_made_unasked(src, dst):
    colour((90, 90)).save(src / "a.png")
    (src / "a.txt").write_text("A")
    assert run(src, dst, "--max_resolution", "64x64") == 0
    assert names(dst) == ["a+64x64.jpg", "a.png", "a.txt"]


def test_relative_folders(src, dst, monkeypatch):
    colour((90, 90)).save(src / "a.png")
    (src / "a.txt").write_text("A")
    monkeypatch.chdir(src.parent)
    assert run("src", "here", "--max_resolution", "64x64", "--copy_associated_files") == 0
    assert names(Path("here")) == ["a+64x64.jpg", "a+64x64.txt", "a.png", "a.txt"]
    monkeypatch.chdir(src)
    assert run(".", "../there/", "--max_resolution", "64x64", "--copy_associated_files") == 0
    assert names(src.parent / "there") == ["a+64x64.jpg", "a+64x64.txt", "a.png", "a.txt"]


def test_odd_names_and_extensions_in_any_case(src, dst):
    odd = ("UPPER.PNG", "Mixed.JpG", "glob[1].png" if portable.WINDOWS else "glob[1]*?.png", "été +5%.webp")
    for name in odd:
        colour((90, 90)).save(src / name, format="PNG")
        (src / Path(name).with_suffix(".txt")).write_text(name)
    (src / "glob1.txt").write_text("what the brackets would match")
    assert run(src, dst, "--max_resolution", "64x64", "--copy_associated_files") == 0
    for name in odd:
        stem = Path(name).stem
        assert size(dst / f"{stem}+64x64.jpg") == (64, 64)
        assert (dst / f"{stem}+64x64.txt").read_text() == name


def test_hidden_files_and_subfolders_are_left_alone(src, dst, capsys):
    colour((90, 90)).save(src / "a.png")
    (src / "._a.png").write_bytes(b"not an image")
    (src / "folder.png").mkdir()
    assert run(src, dst, "--max_resolution", "64x64") == 0
    assert names(dst) == ["a+64x64.jpg", "a.png"]
    assert "subfolders left alone: 1" in capsys.readouterr().out


def test_turned_phone_images_come_out_upright(src, dst):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned clockwise
    pixels = np.zeros((400, 600, 3), np.uint8)
    pixels[:, :300] = 255  # the left half becomes the top
    Image.fromarray(pixels).save(src / "a.jpg", exif=exif, quality=95)
    assert run(src, dst, "--max_resolution", "100x100") == 0
    with Image.open(dst / "a+100x100.jpg") as image:
        assert image.size == (81, 122)
        assert 0x0112 not in image.getexif()
        assert min(image.getpixel((40, 10))) > 250
        assert max(image.getpixel((40, 110))) < 5
    assert (dst / "a.jpg").read_bytes() == (src / "a.jpg").read_bytes()


def test_transparency(src, dst):
    pixels = np.zeros((80, 80, 4), np.uint8)
    pixels[:, :40] = (0, 0, 255, 0)
    pixels[:, 40:] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(src / "a.png")
    assert run(src, dst, "--max_resolution", "40x40") == 0
    assert run(src, dst, "--max_resolution", "40x40", "--save_as_png") == 0
    with Image.open(dst / "a+40x40.png") as image:
        assert image.mode == "RGBA"
        alpha = np.asarray(image)[:, :, 3]
        assert alpha[:, :20].max() == 0
        assert alpha[:, 20:].min() == 255
        assert image.getpixel((30, 5)) == (0, 0, 255, 255)
    with Image.open(dst / "a+40x40.jpg") as image:
        assert min(image.getpixel((5, 5))) >= 253
        assert np.abs(np.subtract(image.getpixel((35, 5)), (0, 0, 255))).max() <= 2


def test_jpeg_is_as_good_as_jpeg_gets(src, dst):
    colour((64, 64)).save(src / "a.png")
    assert run(src, dst, "--max_resolution", "32x32") == 0
    with Image.open(dst / "a+32x32.jpg") as image:
        assert {value for table in image.quantization.values() for value in table} == {1}  # quality 100
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # no channel subsampled


def test_a_second_run_skips_what_is_done(src, dst):
    for name in ("a", "b", "c"):
        colour((90, 90)).save(src / f"{name}.png")
        (src / f"{name}.txt").write_text(name)

    def again(**options: object):
        return resize_images(src, dst, [(64, 64), (32, 32)], copy_associated_files=True, workers=1, **options)

    assert (again().resized, len(names(dst))) == (6, 18)
    before = {name: (dst / name).stat() for name in names(dst)}
    second = again()
    assert (second.resized, second.kept, second.copied) == (0, 6, 0)
    assert {name: (dst / name).stat().st_mtime_ns for name in names(dst)} == {
        name: stat.st_mtime_ns for name, stat in before.items()
    }

    whole = (dst / "a+64x64.jpg").read_bytes()
    (dst / "a+64x64.jpg").write_bytes(whole[:-100])  # broken
    (dst / "b+32x32.jpg").unlink()  # missing
    third = again()
    assert (third.resized, third.kept) == (2, 4)
    assert (dst / "a+64x64.jpg").read_bytes() == whole

    colour((90, 90), (0, 255, 0)).save(src / "c.png")  # newer
    earlier = (src / "c.png").stat().st_mtime_ns - 1
    for name in ("c.png", "c+64x64.jpg", "c+32x32.jpg"):
        os.utime(dst / name, ns=(earlier, earlier))
    fourth = again()
    assert (fourth.resized, fourth.kept, fourth.copied) == (2, 4, 1)
    with Image.open(dst / "c+32x32.jpg") as image:
        assert image.getpixel((9, 9))[1] > 250

    assert again(interpolation="cubic").resized == 6
    assert again(interpolation="cubic", divisible_by=8).resized == 6
    assert again(interpolation="cubic", divisible_by=8).kept == 6


def test_a_source_from_the_future_is_done_once(src, dst):
    colour((90, 90)).save(src / "a.png")
    tomorrow = (src / "a.png").stat().st_mtime + 86400
    os.utime(src / "a.png", (tomorrow, tomorrow))
    assert resize_images(src, dst, [(64, 64)], workers=1).resized == 1
    assert resize_images(src, dst, [(64, 64)], workers=1).kept == 1


def test_a_caption_edited_in_the_destination_stays(src, dst):
    colour((90, 90)).save(src / "a.png")
    (src / "a.txt").write_text("A")
    run(src, dst, "--max_resolution", "64x64", "--copy_associated_files")
    (dst / "a+64x64.txt").write_text("better")
    run(src, dst, "--max_resolution", "64x64", "--copy_associated_files")
    assert (dst / "a+64x64.txt").read_text() == "better"


def test_unreadable_images_are_skipped_and_named(src, dst, capsys):
    colour((90, 90)).save(src / "good.png")
    (src / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    (src / "phone.HEIC").write_bytes(b"....ftypheic")
    assert run(src, dst, "--max_resolution", "64x64") == 0
    out, err = capsys.readouterr()
    assert "images skipped: 2" in out
    assert "bad.jpg" in err
    assert "phone.HEIC: not in an image format that Pillow reads" in err
    assert names(dst) == ["good+64x64.jpg", "good.png"]


def one_error(capsys, *arguments: object, status: int = 1) -> str:
    assert run(*arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_errors_are_one_line_and_leave_nothing_behind(src, dst, capsys):
    assert "has no images" in one_error(capsys, src, dst)
    (src / "bad.png").touch()
    (src / "bad.txt").touch()
    assert "none of its 1 images can be read; the first, bad.png" in one_error(capsys, src, dst)
    colour((90, 90)).save(src / "a.png")
    assert "does not exist" in one_error(capsys, src / "absent", dst)
    assert "is not a folder" in one_error(capsys, src / "a.png", dst)
    assert "is not a folder" in one_error(capsys, src, src / "a.png")
    assert "both source and destination" in one_error(capsys, src, src / ".." / "src")
    for wrong in ("512", "512x", "0x512", "-1x5", "512x512,", "axb", "5.5x5"):
        assert "is not like 512x512,384x384" in one_error(capsys, src, dst, f"--max_resolution={wrong}", status=2)
    assert "--divisible_by must be at least 1, not 0" in one_error(capsys, src, dst, "--divisible_by", 0, status=2)
    assert "invalid choice: 'mitchell'" in one_error(capsys, src, dst, "--interpolation", "mitchell", status=2)
    assert "required" in one_error(capsys, src, status=2)
    assert "did you mean --max_resolution?" in one_error(capsys, src, dst, "--max_resolutoin", "5x5", status=2)
    assert not dst.exists()


def test_two_files_with_one_target_are_refused(src, dst, capsys):
    colour((90, 90)).save(src / "a.png")
    colour((90, 90)).save(src / "a.jpg")
    assert "a.jpg and a.png would both become" in one_error(capsys, src, dst)
    (src / "a.jpg").unlink()
    colour((90, 90)).save(src / "a+512x512.jpg")
    assert "a+512x512.jpg" in one_error(capsys, src, dst)
    assert not dst.exists()
    assert run(src, dst, "--save_as_png") == 0


def test_a_failed_write_leaves_no_temporary_file(src, dst, capsys):
    colour((90, 90)).save(src / "a.png")
    (dst / "a+64x64.jpg").mkdir(parents=True)
    assert "a+64x64.jpg cannot be written" in one_error(capsys, src, dst, "--max_resolution", "64x64")
    assert names(dst) == ["a+64x64.jpg"]


@pytest.mark.parametrize(
    "options",
    [{"resolutions": []}, {"resolutions": [(0, 5)]}, {"divisible_by": 0}, {"workers": 0}, {"interpolation": "fast"}],
)
def test_wrong_arguments_from_python(src, dst, options):
    colour((90, 90)).save(src / "a.png")
    with pytest.raises(ResizeError):
        resize_images(src, dst, **options)
    assert not dst.exists()


def test_run_as_a_file_with_several_processes(src, dst):
    for i in range(4):
        colour((90 + i, 90), (10 * i, 20, 30)).save(src / f"{i}.png")
    (src / "bad.png").touch()
    command = [
        sys.executable,
        str(SCRIPT),
        "src",
        "out",
        "--max_resolution",
        "64x64",
        "--save_as_png",
        "--workers",
        "2",
    ]
    done = subprocess.run(command, cwd=src.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("images: 5, resized: 4, already there: 0, copied: 4, images skipped: 1\n")
    assert done.stderr == "warning: skipped src/bad.png: not in an image format that Pillow reads\n"
    alone = resize_images(src, dst, [(64, 64)], save_as_png=True, workers=1)
    assert alone.resized == 4
    for name in names(dst):
        assert (dst / name).read_bytes() == (src.parent / "out" / name).read_bytes()
