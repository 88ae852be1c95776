"""The studio in a real browser, from an adapter to a merged file. STUDIO_SHOTS names a folder of screenshots."""

import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from lora_adapters import Adapter
from lora_adapters.train.studio.runs import newest_state
from tests.train.generating import differ, pixels

from .browser import ROOT, Browser, studio
from .tiles import dylora_file

pytest.importorskip("gradio")
MODEL = ROOT / "examples" / "tiny-sd"


@pytest.fixture
def places(tmp_path):
    (tmp_path / "adapters").mkdir()
    dylora_file(tmp_path / "adapters" / "tiles.safetensors")
    shutil.copytree(ROOT / "examples" / "images" / "delft" / "train", tmp_path / "images" / "delft")
    return tmp_path


def shot(browser, name):
    if folder := os.environ.get("STUDIO_SHOTS"):
        browser.shot(Path(folder) / f"{name}.png")


def drawn(browser, places, count):
    """The newest of so many images, once the page shows it."""
    folder = places / "output" / "compare"
    browser.until(lambda: folder.is_dir() and len([*folder.glob("*.png")]) == count, f"{count} images")
    browser.until(lambda: browser.one("#image img").get_attribute("src"))
    return max(folder.glob("*.png"), key=lambda path: path.stat().st_mtime)


@pytest.mark.slow
def test_from_sliders_to_a_merged_file(places):
    from selenium.webdriver.common.keys import Keys

    options = ["--model", MODEL, "--adapters", places / "adapters", "--images", places / "images"]
    with studio(*options, "--output", places / "output") as address:
        browser = Browser(address)
        try:
            compare(browser, places, Keys)
            inspect(browser)
            train(browser, places, address)
            merge(browser, places)
        finally:
            browser.close()
        outside(address)


@pytest.mark.slow
def test_a_password_is_asked_for(places):
    file = places / "password"
    file.write_text("a long password")
    with studio("--model", MODEL, "--output", places / "output", "--password_file", file) as address:
        assert urllib.request.urlopen(address).status == 200  # the page on which it is typed
        for path in ("config", "gradio_api/info", f"gradio_api/file={places / 'output' / '.studio' / 'studio.json'}"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}{path}")
            assert refused.value.code == 401
        cookies = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with pytest.raises(urllib.error.HTTPError):
            cookies.open(f"{address}login", data=b"username=studio&password=another")
        cookies.open(f"{address}login", data=b"username=studio&password=a+long+password")
        assert cookies.open(f"{address}config").status == 200


def compare(browser, places, keys):
    browser.click("#draw")
    browser.until(lambda: "the prompt is empty" in browser.one("body").text, "an error in one line")
    shot(browser, "error")
    browser.fill("prompt", "a penguin")
    browser.fill("steps", 4)
    browser.choose("adapters", "tiles.safetensors")
    browser.until(lambda: browser.all("#rank-1 input") and browser.one("#rank-1 input[type=number]"))
    browser.click("#draw")
    whole = drawn(browser, places, 1)
    browser.slide("weight-1", keys.ARROW_LEFT, 8)
    assert browser.value("weight-1") == "0.6"
    browser.slide("rank-1", keys.ARROW_LEFT, 3)
    assert browser.value("rank-1") == "4"
    browser.open("Blocks as sliders")
    browser.fill("block-IN01", 0)
    browser.until(lambda: browser.value("blocks-1").startswith("1,1,0,1"), "block weights as numbers")
    browser.click("#draw")
    less = drawn(browser, places, 2)
    shot(browser, "compare")
    assert differ(pixels(whole), pixels(less)) > 8
    text = Image.open(less).info["parameters"]
    assert "<lora:tiles:0.6>" in text
    assert 'Lora ranks: "tiles: 4"' in text
    assert "--network_mul 0.6 --network_args rank=4" in " ".join(browser.one("#command").text.split())
    browser.tab("Merge into a file")
    browser.fill("merge-name", "mild")
    browser.click("#merge")
    browser.until(lambda: "Done: merging mild" in browser.job(), "the merged file")
    mild = Adapter.load(places / "output" / "mild.safetensors")
    assert mild.rank == 4
    browser.open("Grid")
    browser.choose("axis-across", "weight of adapter 1")
    browser.fill("values-across", "0, 1")
    browser.choose("axis-down", "seed")
    browser.fill("values-down", "1, 2")
    browser.click("#draw")
    drawn(browser, places, 3)
    shot(browser, "grid")


def inspect(browser):
    browser.tab("Inspect")
    browser.choose("inspect-1", "tiles.safetensors")
    browser.until(lambda: "DyLoRA (unit 4)" in browser.one("#summary-1").text)
    browser.choose("inspect-2", "mild.safetensors")
    browser.until(lambda: "rank" in browser.one("#summary-2").text)
    browser.until(lambda: browser.all("#norm-2 svg, #norm-2 canvas"))
    shot(browser, "inspect")
    browser.tab("Tags")
    browser.until(lambda: "blue tile" in browser.one("#tags-1").text)


def train(browser, places, address):
    browser.tab("Train")
    browser.choose("images", "delft")
    browser.until(lambda: len(browser.all("#gallery img")) == 24, "24 images")
    browser.all("#gallery button.thumbnail-item, #gallery .thumbnail-item")[0].click()
    browser.until(lambda: browser.value("caption") == "an airplane")
    browser.fill("caption", "a blue airplane")
    browser.click("#save-caption")
    caption = places / "images" / "delft" / "airplane.txt"
    browser.until(lambda: caption.read_text() == "a blue airplane\n")
    browser.choose("machine", "and smaller models, without a GPU")
    browser.choose("purpose", "a way of drawing or photographing")
    browser.until(lambda: browser.value("train-steps") == "800", "1600 images, two a step")
    browser.choose("type", "LoRA")
    for name, value in (("run-name", "mine"), ("rank", 4), ("train-steps", 10), ("rate", 0.001), ("resolution", 64),
                        ("sample-every", 5), ("sample-prompts", "a cat --w 64 --h 64 --s 2")):  # fmt: skip
        browser.fill(name, value)
    browser.click("#dry-run")
    browser.until(lambda: "Done: dry run of mine" in browser.job(), "a dry run")
    browser.until(lambda: "an epoch: 24 training images" in browser.value("log"), "its report")
    shot(browser, "dry-run")
    browser.click("#start")
    browser.until(lambda: "Running: training mine" in browser.job(), "a training")
    browser.driver.get(address)  # closing the page loses nothing
    browser.until(lambda: browser.all("#prompt textarea"))
    browser.until(lambda: "Done: training mine" in browser.job(), "ten steps")
    browser.tab("Train")
    browser.until(lambda: browser.all("#losses svg, #losses canvas"), "the loss")
    browser.until(lambda: len(browser.all("#samples img")) >= 2, "samples")
    assert browser.value("run-name") == "mine"
    shot(browser, "train")
    browser.open("Report of the run")
    browser.driver.switch_to.frame(browser.one("#report iframe"))
    assert "finished: step 10 of 10" in browser.one("body").text
    browser.driver.switch_to.default_content()
    shot(browser, "train-report")
    run = places / "output" / "mine"
    assert Adapter.load(run / "mine.safetensors").rank == 4
    assert newest_state(run)[0] == 10
    browser.fill("train-steps", 100000)
    browser.click("#resume")
    browser.until(lambda: "11/100000" in browser.job() or "12/100000" in browser.job(), "step 11")
    browser.click("#stop")
    browser.until(lambda: "Stopped: training mine" in browser.job(), "the stop")
    assert newest_state(run)[0] > 10


def merge(browser, places):
    browser.tab("Tools")
    field = browser.one("#merge-adapters input")
    assert field.is_displayed()
    browser.choose("merge-adapters", "tiles.safetensors")
    browser.choose("merge-adapters", "mine.safetensors")
    browser.fill("merge-weights", "0.5, 0.5")
    browser.fill("merge-into-name", "both")
    shot(browser, "tools")
    browser.click("#merge-start")
    browser.until(lambda: "Done: merge both" in browser.job(), "a merged file")
    assert "both.safetensors" in browser.job()
    assert (
        Adapter.load(places / "output" / "both.safetensors").modules.keys()
        >= Adapter.load(places / "output" / "mine" / "mine.safetensors").modules.keys()
    )


def outside(address):
    """What the page may not show or be asked for."""
    for path in (ROOT / "pyproject.toml", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    for headers, status in (({"Host": "elsewhere.example"}, 400), ({"Origin": "http://elsewhere.example"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(address, data=b"{}", headers=headers))
        assert refused.value.code == status
