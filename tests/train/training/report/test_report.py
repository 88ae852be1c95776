"""The page that is written beside an adapter: what is in it, when it is written, and that it never stops a run."""

import base64
import html
import io
import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest
from markupsafe import escape
from PIL import Image

from lora_adapters import Adapter
from lora_adapters.train.options.arguments import settings
from lora_adapters.train.stopping import Interrupted
from lora_adapters.train.training import loop
from lora_adapters.train.training.loop import train
from lora_adapters.train.training.report.charts import held_out_chart, loss_chart, rank_chart
from lora_adapters.train.training.report.record import Record, last_by_rank, read_record, recommended_rank, thinned
from lora_adapters.train.training.validation import HeldOut

EVIL = '</script><script>document.title = "bad"</script>'


@pytest.fixture(scope="module")
def options(sd1, tmp_path_factory):
    """A short run of a DyLoRA with everything that the page shows, on captions that try to be HTML."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 90, 20)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"a {EVIL}, <b>bold</b> & more")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"a {EVIL} --w 32 --h 32 --s 1\n")
    (folder / "data.toml").write_text(
        "[general]\nresolution = 64\ncaption_extension = '.txt'\n"
        "[[datasets]]\nbatch_size = 2\nvalidation_split = 0.34\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'images'}'\n"
    )
    return {
        "pretrained_model_name_or_path": str(sd1), "dataset_config": str(folder / "data.toml"), "output_name": "mine",
        "network_module": "networks.dylora", "network_dim": 4, "network_args": {"unit": 2}, "learning_rate": 1e-2,
        "seed": 1, "max_train_steps": 4, "sample_prompts": str(prompts), "sample_every_n_steps": 2, "save_state": True,
        "sample_at_first": True, "save_every_n_steps": 2, "cache_latents": True, "max_data_loader_n_workers": 0,
        "training_comment": "<i>&", "huggingface_token": "a secret",
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("out it's")
    result = train(settings(**options, output_dir=str(out)))
    return out, result, (out / "mine-report.html").read_text(encoding="utf-8")


def test_everything_is_in_it(trained) -> None:
    out, result, page = trained
    assert "finished: step 4 of 4" in page
    assert page.count("<svg") == 3
    assert page.count("data:image/jpeg;base64,") == 3
    for step in (0, 2, 4):
        assert f"<figcaption>step {step}</figcaption>" in page
    assert str(escape(str(out / "mine.safetensors"))) in page
    assert "<code>learning_rate</code></td><td>0.01</td>" in page
    assert "a secret" not in page
    record = read_record(out / "mine-report.html")
    assert [entry[0] for entry in record.losses] == [1, 2, 3, 4]
    assert [loss for _, loss, _ in record.losses] == result.losses
    assert [HeldOut(*entry) for entry in record.held_out] == result.held_out
    assert f"<strong>Rank {recommended_rank(last_by_rank(record))}</strong>" in page


def test_it_is_one_file_and_text_stays_text(trained) -> None:
    _, _, page = trained
    assert "<script>" not in page
    assert page.count("<script") == page.count("</script>") == 1
    assert str(escape(EVIL)) in page
    assert "<b>" not in page
    assert "<i>" not in page
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', page)
    assert all(link.startswith("data:") for link in links)
    image = re.search(r"base64,([^\"]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(image[1]))).format == "JPEG"


@pytest.mark.slow
def test_its_commands_run(trained, monkeypatch, capsys) -> None:
    from lora_adapters import cli

    out, _, page = trained
    commands = [
        shlex.split(html.unescape(text)) for text in re.findall(r"<pre>(lora-adapters .*?)</pre>", page, re.DOTALL)
    ]
    assert [words[1] for words in commands] == ["info", "generate", "generate", "split", "merge", "train"]
    for words in commands:
        small = ["--steps", "1", "--W", "32", "--H", "32", "--outdir", str(out)] if words[1] == "generate" else []
        longer = ["--max_train_steps", "5", "--no_report"] if words[1] == "train" else []
        assert cli.main([*words[1:], *small, *longer]) == 0, (words, capsys.readouterr().err)
    assert Adapter.load(out / "mine.safetensors").metadata["ss_steps"] == "5"


QUICK = {"sample_prompts": None, "sample_every_n_steps": None, "sample_at_first": False, "save_state": False}


def test_it_can_be_turned_off_and_a_failure_is_one_warning(options, tmp_path, monkeypatch, caplog) -> None:
    quick = {**options, **QUICK, "max_train_steps": 2, "save_every_n_steps": 1}

    def broken(*_):
        raise RuntimeError("no room\nmore")

    monkeypatch.setattr("lora_adapters.train.training.report.charts.loss_chart", broken)
    train(settings(**quick, output_dir=str(tmp_path / "off"), no_report=True))
    assert not [one for one in caplog.records if "report" in one.getMessage()]
    train(settings(**quick, output_dir=str(tmp_path / "broken")))
    said = [one.getMessage() for one in caplog.records if "report" in one.getMessage()]
    assert said == [f"the report is not written at step {step} (no room)" for step in (1, 2)]
    assert (tmp_path / "broken" / "mine.safetensors").exists()
    assert not list(tmp_path.rglob("*.html"))


def test_a_resumed_run_goes_on_with_the_record(trained, options, tmp_path) -> None:
    out, _, _ = trained
    copy = shutil.copytree(out, tmp_path / "copy")
    state = copy / "mine-step00000002-state"
    train(settings(**{**options, **QUICK, "max_train_steps": 3, "resume": str(state), "output_dir": str(copy)}))
    record, before = read_record(copy / "mine-report.html"), read_record(out / "mine-report.html")
    assert [step for step, _, _ in record.losses] == [1, 2, 3]
    assert record.losses == before.losses[:3]
    assert [step for step, _ in record.samples] == [0, 2]
    (tmp_path / "other.html").write_text('<script type="application/json" id="record">{"losses": 3}</script>')
    assert read_record(tmp_path / "other.html") == read_record(tmp_path / "nowhere.html") == Record()


def test_charts_and_choices() -> None:
    empty = Record()
    assert (loss_chart(empty), held_out_chart(empty), rank_chart(empty)) == (None, None, None)
    plain = Record([(1, 0.5, 1e-4)], [(0, None, 0.4), (1, None, 0.3)])
    assert "<svg" in loss_chart(plain)
    assert "<svg" in held_out_chart(plain)
    assert rank_chart(plain) is None
    assert recommended_rank({}) is None
    assert recommended_rank({4: 0.1011, 8: 0.1009, 12: 0.1}) == 8
    assert thinned(list(range(10)), 3) == [2, 6, 9]
    assert thinned([1, 2], 3) == [1, 2]
    long = Record([(step, 1.0 / step, 1e-4) for step in range(1, 100_001)])
    assert len(loss_chart(long)) < 300_000
    known = Record([(1, 0.5, 1e-4), (2, 0.4, 1e-4)], [(2, 4, 0.3)], [(2, "x")])
    assert known.before(1) == Record([(1, 0.5, 1e-4)])
    known.add_held_out([HeldOut(2, 4, 9.0), HeldOut(3, 4, 0.2)])
    assert known.held_out == [(2, 4, 0.3), (3, 4, 0.2)]


@pytest.mark.slow
def test_in_a_browser(trained, tmp_path) -> None:
    """Chromium draws the page: nothing of the captions runs, charts and images have a size."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium")
    out, _, _ = trained
    common = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    address = (out / "mine-report.html").as_uri()
    dumped = subprocess.run([*common, "--dump-dom", address], capture_output=True, text=True, timeout=120).stdout
    assert "<title>mine</title>" in dumped
    shot = tmp_path / "shot.png"
    size = ["--hide-scrollbars", "--window-size=960,1600", f"--screenshot={shot}"]
    subprocess.run([*common, *size, address], capture_output=True, timeout=120)
    drawn = Image.open(shot).convert("RGB")
    colours = {colour for _, colour in drawn.getcolors(maxcolors=1 << 24)}
    assert drawn.size == (960, 1600)
    assert (31, 119, 180) in colours  # matplotlib's blue: the running mean
    assert (44, 160, 44) in colours  # and its green: the recommended rank


@pytest.mark.slow
def test_stopping_writes_it_too(options, tmp_path, monkeypatch) -> None:
    made = loop._step

    def stopped(run, step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(run, step, *rest)

    monkeypatch.setattr(loop, "_step", stopped)
    with pytest.raises(Interrupted):
        train(settings(**{**options, **QUICK, "save_every_n_steps": None}, output_dir=str(tmp_path)))
    assert "training: step 2 of 4" in (tmp_path / "mine-report.html").read_text(encoding="utf-8")
