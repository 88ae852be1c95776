"""What the one command writes of its measurements, and that it measures nothing twice."""

import argparse
import functools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import file_tools
import peak_memory
import speed_table
from speed import live

from lora_adapters import Adapter
from tests.benchmarks import full_size

STEP = {"name": "sd15: LierLa", "ms": 1237.55, "ratio": 1.0046, "MiB": 323.9}
LOOP = {"name": "sd15: training loop", "ms": 1748.6, "ratio": 1.033, "MiB": None}
LIVE = {
    "ours": {"seconds": 0.2669, "MiB": 67.2},
    "stock": {"seconds": 0.3319, "MiB": 72.7},
    "ratio": 0.794,
    "rounds": 3,
}
SIDES_OF = (("ours", 0), ("stock", 2848))


def test_the_table_has_every_measurement(tmp_path) -> None:
    (tmp_path / "training.json").write_text(json.dumps([STEP, LOOP]))
    (tmp_path / "files.md").write_text("| merge | 6.0 s |\n")
    lines = speed_table.table({"machine": "this", "live": {"sd15 load rank 16": LIVE}}, tmp_path).splitlines()
    assert "| sd15 load rank 16 | 267 ms | 332 ms | 0.794 | 67 MiB | 73 MiB |  |" in lines
    assert "| sd15: LierLa | 1237.5 | 1.005 | 324 |" in lines
    assert "| sd15: training loop | 1748.6 | 1.033 |  |" in lines
    assert "| merge | 6.0 s |" in lines


def test_memory_in_no_file_stands_beside_all(tmp_path) -> None:
    loaded = LIVE | {side: {"seconds": 0.3, "MiB": 40.4, "anonymous": 19.6} for side, _ in SIDES_OF}
    lines = speed_table.table({"machine": "this", "live": {"sd15 load rank 16": loaded}}, tmp_path).splitlines()
    assert lines[-1] == "| sd15 load rank 16 | 300 ms | 300 ms | 0.794 | 40 MiB, 20 | 40 MiB, 20 |  |"


def test_there_is_no_chart_of_nothing(tmp_path) -> None:
    speed_table.chart({"live": {}}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has /proc")
def test_the_peak_of_memory_is_that_of_the_action(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(16 << 20))

    def take() -> None:
        mapped = torch.UntypedStorage.from_file(str(file), False, 16 << 20)
        torch.ones(8 << 20, dtype=torch.uint8).max()
        torch.empty(0, dtype=torch.uint8).set_(mapped).max()

    take()  # what PyTorch's own libraries have of it is there from now on
    resident, anonymous = peak_memory.peaks_above_rest(take)
    assert 15 < resident < 40
    assert 7 < anonymous < 14


def test_operations_stand_beside_what_is_drawn(tmp_path) -> None:
    drawn = LIVE | {side: {"seconds": 4.0, "MiB": 1.0, "operations": 3953 + extra} for side, extra in SIDES_OF}
    lines = speed_table.table({"machine": "this", "live": {"sd15 draw with 3": drawn}}, tmp_path).splitlines()
    assert lines[-1].endswith("| 3953, 6801 |")
    assert speed_table.middle([3, None, 1, 2]) == 2
    assert speed_table.middle([None]) is None


@pytest.mark.parametrize("kept", [(), ("training.json", "files.json")])
def test_the_chart_has_a_panel_for_each_part_that_was_measured(kept, tmp_path, monkeypatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    contents = {"training.json": [STEP], "files.json": {"merge": {"ours": {"seconds": 6.0}, "kohya": {"seconds": 9.0}}}}
    for name in kept:
        (tmp_path / name).write_text(json.dumps(contents[name]))
    figures = []
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda self, path, **_: figures.append(self))
    speed_table.chart({"live": {"sd15 load rank 16": LIVE}}, tmp_path)
    titles = [axes.get_title() for axes in figures[0].axes if axes.axison]
    assert len(titles) == 2 + len(kept)
    assert "load_lora_weights" in titles


def test_the_cases_of_a_size(tmp_path) -> None:
    names = [case.name for case in speed_table.live_cases(tmp_path, ["sd15", "sdxl"], [4, 16])]
    assert len(set(names)) == len(names)
    assert "sd15 draw with 8" in names
    assert "sdxl load an eighth adapter, rank 16" in names
    assert not any(name.startswith("sdxl draw") for name in names)


LOAD = {"seconds": 0.2, "MiB": 131.2, "anonymous": 66.0}


def test_a_kind_is_beside_the_lora_with_as_many_modules(tmp_path) -> None:
    kinds = {"sd15 load loha": {"kind": LOAD | {"seconds": 0.3}, "lora": LOAD, "ratio": 1.5, "rounds": 3}}
    lines = speed_table.table({"machine": "this", "live": {}, "kinds": kinds}, tmp_path).splitlines()
    assert lines[-1] == "| sd15 load loha | 300 ms | 1.50 | 131 MiB, 66 | 131 MiB, 66 |"


def test_kinds_are_measured_in_turns_and_once(tmp_path, monkeypatch) -> None:
    asked = []

    def run(case, side):
        asked.append((case.name, case.second.name, side))
        return {"file": LOAD | {"seconds": 0.3}, "second": LOAD}

    monkeypatch.setattr(speed_table, "run_live", run)
    monkeypatch.setattr(speed_table, "make_kind", lambda case: None)
    monkeypatch.setattr(speed_table, "chart", lambda *_: None)
    options = [
        "--out",
        str(tmp_path),
        "--only",
        "live",
        "--rounds",
        "1",
        "--cases",
        "load norm",
        "load full in bfloat16",
    ]
    monkeypatch.setattr(sys, "argv", ["speed_table.py", *options])
    speed_table.main()
    speed_table.main()
    assert asked == [
        ("sd15 load full in bfloat16", "sd15-lora-16-all.safetensors", "ours"),
        ("sd15 load norm", "sd15-lora-16-few.safetensors", "ours"),
    ]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["kinds"]["sd15 load norm"]["ratio"] == pytest.approx(1.5)
    assert not kept["live"]


def test_the_files_of_a_kind(tmp_path, monkeypatch) -> None:
    few = list(full_size.modules("sd15"))[:2]
    monkeypatch.setattr(full_size, "modules", lambda _: iter(few))
    found = {}
    for case in speed_table.kind_cases(tmp_path, ["sd15", "sdxl"]):
        speed_table.make_files(case)
        found[case.name.removeprefix("sd15 load ")] = Adapter.load(case.file), Adapter.load(case.second)
    assert list(found) == list(speed_table.KINDS)
    assert {name: {one.kind for one in made.modules.values()} for name, (made, _) in found.items()} == {
        "loha": {"LoHa"},
        "lokr": {"LoKr"},
        "dora": {"DoRA"},
        "full in float16": {"full"},
        "full in bfloat16": {"full"},
        "norm": {"norm"},
    }
    assert all(made.modules.keys() == lora.modules.keys() for name, (made, lora) in found.items() if name != "norm")
    for dtype in (torch.float16, torch.bfloat16):
        made, _ = found[f"full in {str(dtype).removeprefix('torch.')}"]
        assert {one.diff.dtype for one in made.modules.values()} == {dtype}
    assert len(found["norm"][0].modules) == 109


def test_files_in_turns(tmp_path) -> None:
    done = []
    actions = {name: functools.partial(done.append, name) for name in "ab"}
    found = live.in_turns(actions, lambda: done.append("undo"), 2)
    assert [one for one in done if one != "undo"] == list("aabbabab")
    assert {name: len(one.times) for name, one in found.items()} == {"a": 2, "b": 2}


def test_merges_of_kinds_have_a_table_of_their_own() -> None:
    times = {"seconds": 9.0, "anonymous": 400, "peak": 2000, "status": 0}
    merge = "merge a {} of all layers into the model"
    results = {
        f"sd15 {merge.format(kind)}": {"ours": times | {"cpu": cpu}} for kind, cpu in (("lora", 5.0), ("full", 6.0))
    }
    lines = file_tools.markdown(results).splitlines()
    assert lines[-1] == f"| sd15 {merge.format('full')} | 9.0 s | 6.0 s | 400 MB | 2000 MB | 1.20 |"
    assert sum("merge" in line for line in lines) == 2


def test_only_the_adapter_of_a_merge_is_made(tmp_path, monkeypatch) -> None:
    made: list[str] = []
    for name in ("make_adapter", "make_lycoris", "make_checkpoint"):
        monkeypatch.setattr(file_tools, name, lambda path, *_: made.append(path.name))
    cases = {case.name: case for case in file_tools.cases(tmp_path, "sd15")}
    file_tools.make_inputs(tmp_path, "sd15", cases["sd15 merge a dora of all layers into the model"].options)
    assert [name for name in made if "-dora" in name or "-full" in name] == ["sd15-dora.safetensors"]


def test_training_is_not_measured_again(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(speed_table.subprocess, "run", lambda command, check: asked.append(command))
    args = argparse.Namespace(out=tmp_path, kohya=None, sizes=["sdxl"], latent=16)
    speed_table.training(args)
    assert [asked[0][n + 1] for n, word in enumerate(asked[0]) if word in ("--models", "--latent")] == ["tiny-sd", "16"]
    (tmp_path / "training.json").write_text("[]")
    speed_table.training(args)
    assert len(asked) == 1


def test_files_of_the_sizes_asked_for(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(speed_table.subprocess, "run", lambda command, check: asked.append(command))
    args = argparse.Namespace(out=tmp_path, kohya=Path("k"), kohya_python="p", sizes=["sd15", "sdxl"], most=9.0)
    speed_table.files(args, tmp_path)
    assert [command[-2:] for command in asked] == [["--only", "sd15"], ["--only", "sdxl"]]
    assert all("--missing" in command and command[command.index("--most") + 1] == "9.0" for command in asked)


def test_a_file_tool_is_measured_where_numbers_are_missing(tmp_path, monkeypatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(file_tools, "make_inputs", lambda *_: None)
    monkeypatch.setattr(file_tools, "measure", lambda command, *_: measured.append(command[1]) or {"status": 0})
    results, options = tmp_path / "r.json", ["file_tools.py", "--folder", str(tmp_path), "--only", "sd15", "extract"]
    results.write_text(json.dumps({"sd15 extract dim 32": {"ours": {"status": 0}}}))
    monkeypatch.setattr(sys, "argv", [*options, "--results", str(results), "--missing"])
    file_tools.main()
    assert [Path(one).stem for one in measured] == ["extract_lora_from_models"]
    assert set(json.loads(results.read_text())) == {"sd15 extract dim 32", "sd15 extract dim 128 conv_dim 64"}


@pytest.mark.parametrize(("word", "kohyas"), [("extract", 2), ("curve:", 0)])
def test_kohyas_scripts_take_part_but_in_the_curves(word, kohyas, tmp_path, monkeypatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(file_tools, "make_inputs", lambda *_: None)
    monkeypatch.setattr(file_tools, "measure", lambda command, *_: measured.append(command[0]) or {"status": 0})
    options = ["--folder", str(tmp_path), "--only", "sd15", word, "--kohya", "k", "--kohya_python", "kohyas-python"]
    monkeypatch.setattr(sys, "argv", ["file_tools.py", *options])
    file_tools.main()
    assert measured.count("kohyas-python") == kohyas
    assert len(measured) > kohyas


def test_make_measures_nothing(tmp_path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(speed_table, "make_files", lambda case: made.append(case.name))
    for name in ("run_live", "training", "files"):
        monkeypatch.setattr(speed_table, name, lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(speed_table, "chart", lambda *_: None)
    options = ["--out", str(tmp_path), "--make", "--sizes", "sd15", "--ranks", "4"]
    monkeypatch.setattr(sys, "argv", ["speed_table.py", *options])
    speed_table.main()
    assert {"sd15 load rank 4", "sd15 load loha"} <= set(made)
