"""Who may come in, what the page is built of, and errors in one line."""

import os
import sys

import pytest

from lora_adapters.cli import main
from lora_adapters.convert.errors import UsageError
from lora_adapters.train.studio import access, program
from lora_adapters.train.studio.paths import Folders


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(access.PASSWORD, raising=False)


def arguments(*words):
    return program.parser().parse_args(["--model", "m", *map(str, words)])


def test_others_come_in_with_a_password_only(tmp_path, monkeypatch):
    for flag in ("--listen", "--share"):
        with pytest.raises(UsageError, match=f"{flag} gives others access: set a password"):
            access.password(arguments(flag))
    assert access.password(arguments()) is None
    file = tmp_path / "password"
    file.write_text("long enough\n")
    assert access.password(arguments("--listen", "--password_file", file)) == "long enough"
    file.write_text("\n")
    with pytest.raises(UsageError, match="has 0 characters"):
        access.password(arguments("--password_file", file))
    with pytest.raises(UsageError, match="cannot be read"):
        access.password(arguments("--password_file", tmp_path / "none"))
    monkeypatch.setenv(access.PASSWORD, "short")
    with pytest.raises(UsageError, match="has 5 characters"):
        access.password(arguments("--share"))
    monkeypatch.setenv(access.PASSWORD, "from the environment")
    assert access.password(arguments("--share")) == "from the environment"


def test_what_gradio_is_started_with(tmp_path, monkeypatch):
    pytest.importorskip("starlette")
    alone = access.launch_options(arguments(), None, tmp_path)
    assert (alone["server_name"], alone["share"], alone["auth"]) == ("127.0.0.1", False, None)
    own, host = alone["app_kwargs"]["middleware"]
    assert own.cls is access.OwnOrigin
    assert host.kwargs == {"allowed_hosts": ["127.0.0.1", "localhost"]}
    assert alone["allowed_paths"] == [str(tmp_path)]
    others = access.launch_options(arguments("--listen", "--port", 7999), "long enough", tmp_path)
    assert (others["server_name"], others["server_port"], others["share"]) == ("0.0.0.0", 7999, False)
    assert others["auth"] == ("studio", "long enough")
    assert [layer.cls for layer in others["app_kwargs"]["middleware"]] == [access.OwnOrigin]
    shared = access.launch_options(arguments("--share"), "long enough", tmp_path)
    assert (shared["server_name"], shared["share"], shared["auth"][1]) == ("127.0.0.1", True, "long enough")


@pytest.mark.parametrize(
    ("origin", "status"),
    [(None, 200), ("http://127.0.0.1:7860", 200), ("http://elsewhere.example", 403), ("null", 403)],
)
def test_pages_of_other_sites_are_refused(origin, status):
    pytest.importorskip("starlette")
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("in"), methods=["POST"])])
    client = TestClient(access.OwnOrigin(app), base_url="http://127.0.0.1:7860")
    assert client.post("/", headers={"Origin": origin} if origin else {}).status_code == status


def test_folders_are_there(tmp_path):
    made = program.folders(arguments("--adapters", tmp_path, "--output", tmp_path / "new"))
    assert made.private.is_dir()
    for flag in ("--adapters", "--images"):
        with pytest.raises(UsageError, match=f"{flag} .*none is not a folder"):
            program.folders(arguments(flag, tmp_path / "none"))
    for flag in ("--images", "--pictures"):  # the second is the option's former name
        made = program.folders(arguments(flag, tmp_path, "--images", tmp_path / "new", "--output", tmp_path / "new"))
        assert made.images == (tmp_path, tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--output .* is not a folder"):
        program.folders(arguments("--output", tmp_path / "file"))


def test_the_model_is_told_as_generate_takes_it():
    from lora_adapters.train.generation.options import parse

    words = program.model_words(arguments("--fp16", "--model_config", "configs"))
    read = parse(words)
    assert (read.pretrained_model_name_or_path, read.model_config, read.fp16, read.bf16) == (
        "m",
        "configs",
        True,
        False,
    )


def test_without_gradio_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    assert main(["studio", "--model", "m", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == 'error: the studio needs Gradio: pip install "lora-adapters[studio]"\n'
    assert main(["studio", "--model", "m", "--listen", "--output", str(tmp_path)]) == 2
    assert "--listen gives others access" in capsys.readouterr().err
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / ".studio" / "page")


def test_the_page_has_its_tabs_and_fields(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "page"))
    from lora_adapters.train.studio.app import build

    page = build(Folders("m", tmp_path), ["--ckpt=m"])
    parts = [part["props"] for part in page.config["components"]]
    labels = [part.get("label") for part in parts]
    assert [label for label in labels if label in ("Compare", "Inspect", "Train", "Tools")] == [
        "Compare", "Inspect", "Train", "Tools",
    ]  # fmt: skip
    ids = {part.get("elem_id") for part in parts}
    assert {f"block-{name}" for name in ("BASE", "IN00", "MID", "OUT11")} <= ids
    assert {"draw", "start", "stop", "resume", "dry-run", "merge-start", "extract-start", "convert-start"} <= ids


def test_errors_of_users_are_messages_of_the_page():
    gradio = pytest.importorskip("gradio")
    from lora_adapters.convert.errors import AdapterError
    from lora_adapters.train.studio.page import shown

    def fails(error):
        raise error

    with pytest.raises(gradio.Error, match="&lt;script&gt; is no adapter"):
        shown(fails)(AdapterError("<script> is no adapter"))
    with pytest.raises(gradio.Error, match="x: No such file"):
        shown(fails)(FileNotFoundError(2, "No such file", "x"))
    with pytest.raises(KeyError):
        shown(fails)(KeyError("a fault of the program"))


def test_the_bar_of_an_ended_job_shows_what_it_said(tmp_path):
    pytest.importorskip("gradio")
    from lora_adapters.train.studio.jobs import Job, Jobs, Status
    from lora_adapters.train.studio.page import job_bar, job_log

    log = tmp_path / "log.txt"
    log.write_text("$ lora-adapters x\n\rwriting: 50%|##  | 1/2\r  \r<b>.safetensors: rank 4\n  in A1111: <lora:b:1>\n")
    jobs = Jobs(tmp_path)
    jobs.status = lambda: Status(Job("x & y", ("x",), str(log), 1, 0.0, 0.0), code=0)
    bar = job_bar(jobs)
    assert "<b>Done: x &amp; y</b>" in bar
    assert "&lt;b&gt;.safetensors: rank 4</span>" in bar
    assert job_log(jobs).splitlines()[-2:] == ["<b>.safetensors: rank 4", "  in A1111: <lora:b:1>"]
