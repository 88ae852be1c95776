"""One job at a time, whose end, output and process outlive the page and the studio."""

import json
import os
import subprocess
import time

import pytest

from lora_adapters.train.studio import jobs as module
from lora_adapters.train.studio.jobs import Jobs, Status, as_lines, claim, log_text, progress_of
from lora_adapters.train.studio.paths import StudioError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A program in the place of `python -m lora_adapters`: `sleep`, `say TEXT` or `fail`."""
    folder = tmp_path / "lora_adapters"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text(
        "import os, sys, time\n"
        "print(*sys.argv[1:], os.environ.get('LORA_ADAPTERS_PROGRESS'), flush=True)\n"
        "time.sleep(60 if sys.argv[1] == 'sleep' else 0)\n"
        "sys.exit(sys.argv[1] == 'fail')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_job_runs_and_says_how_it_ended(package, tmp_path):
    called = []
    jobs = Jobs(tmp_path, before=lambda: called.append(1))
    assert jobs.status() == Status()
    job = jobs.start("saying", ["say", "two words"], tmp_path / "log.txt")
    status = jobs.wait(20)
    assert (status.running, status.code, status.text) == (False, 0, "Done: saying")
    assert log_text(job) == "$ lora-adapters say 'two words'\nsay two words 1\n"
    assert called == [1]
    later = jobs.start("failing", ["fail"], tmp_path / "log.txt")
    assert jobs.wait(20).text == "Failed: failing"
    assert log_text(later) == "$ lora-adapters fail\nfail 1\n"  # its own part of the log


def test_there_are_never_two(package, tmp_path):
    jobs = Jobs(tmp_path)
    jobs.start("sleeping", ["sleep"], tmp_path / "log.txt")
    for title in ("again", "drawing"):
        with pytest.raises(StudioError, match="sleeping is still running"), jobs.reserved(title):
            pass
    with pytest.raises(StudioError, match="sleeping is still running"):
        jobs.start("second", ["say"], tmp_path / "log.txt")
    assert jobs.stop() == "Stopping: sleeping"
    assert jobs.wait(20).text == "Stopped: sleeping"
    with jobs.reserved("drawing"), pytest.raises(StudioError, match="drawing is still running"):
        jobs.start("second", ["say"], tmp_path / "log.txt")
    jobs.start("second", ["say"], tmp_path / "log.txt")
    assert jobs.wait(20).code == 0


def test_a_new_studio_finds_the_job_of_the_last_one(package, tmp_path):
    first = Jobs(tmp_path)
    job = first.start("sleeping", ["sleep"], tmp_path / "log.txt")
    second = Jobs(tmp_path)
    assert second.status().running
    assert second.status().job == job
    with pytest.raises(StudioError, match="sleeping is still running"):
        second.start("second", ["say"], tmp_path / "log.txt")
    second.stop()
    first.wait(20)
    assert second.status().text == "Ended: sleeping"


def test_another_process_of_the_same_number_is_not_the_job(package, tmp_path, monkeypatch):
    first = Jobs(tmp_path)
    job = first.start("saying", ["say"], tmp_path / "log.txt")
    first.wait(20)
    monkeypatch.setattr(module, "_created", lambda pid: job.created + 60)
    assert not Jobs(tmp_path).status().running


def test_a_broken_record_is_no_job(tmp_path):
    (tmp_path / "job.json").write_text('{"title": 1}')
    assert Jobs(tmp_path).status() == Status()
    assert Jobs(tmp_path).stop() == "Nothing is running."


def test_a_folder_has_one_studio(tmp_path):
    file = tmp_path / "out" / ".studio" / "studio.json"
    claim(file)
    claim(file)  # once more in the same process
    other = subprocess.Popen(["sleep", "60"])
    try:
        file.write_text(json.dumps([other.pid, module._created(other.pid)]))
        with pytest.raises(StudioError, match=f"another studio .process {other.pid}. uses {tmp_path / 'out'}"):
            claim(file)
    finally:
        other.kill()
        other.wait()
    claim(file)
    assert json.loads(file.read_text())[0] == os.getpid()


def test_progress_is_that_of_the_last_bar():
    log = (
        "\rcaching:  68%|██▌  | 13/19 [00:00<00:00]\rcaching: 100%|█████| 19/19 [00:01]\n"
        "\rtraining:  40%|██   | 4/10 [00:06<00:08,  1.48s/step, loss=0.56]\r   \rsaved x\n"
    )
    assert progress_of(log) == (0.4, "training · 4/10 [00:06<00:08,  1.48s/step, loss=0.56]")
    assert progress_of("no bar, 40% of it") == (0.0, "")
    assert as_lines("a\rb\r\nc\n") == ["b", "c", ""]


def test_bars_of_file_tools_are_shown_where_they_are_asked_for(monkeypatch, capsys):
    from lora_adapters.convert.progress import SHOW, progress

    monkeypatch.delenv(SHOW, raising=False)
    things = (time.sleep(0.4) for _ in range(4))
    list(progress(things, "quiet", 4))
    assert "quiet" not in capsys.readouterr().err
    monkeypatch.setenv(SHOW, "1")
    things = (time.sleep(0.4) for _ in range(4))
    list(progress(things, "loud", 4))
    assert progress_of(capsys.readouterr().err)[0] >= 0.5
