"""Files that are pipes, compressed, cut short or too large, and disks and memory that are: one line each, in time."""

import json
import os
import resource
import signal
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.programs.info import block_norms
from lora_adapters.convert.storage import files
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.storage.files import read_tensors
from lora_adapters.convert.storage.folder_files import pipeline_files
from lora_adapters.convert.storage.weights_writing import Planned, stream
from tests.convert.checkpoints import original
from tests.convert.scripts import SD15, fails, run

LORA = SD15 / "lierla.safetensors"
MODULE = ModuleName("unet", "mid_block.attentions.0.proj_in")
KEY = "model.diffusion_model.middle_block.1.proj_in.weight"


@pytest.fixture(autouse=True)
def in_time():
    """A read that hangs is a failure, not the end of the test run."""

    def late(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["pipe.safetensors", "pipe.ckpt", "/dev/zero", "link.safetensors"])
@pytest.mark.parametrize(
    "program", ["merge", "into", "model", "extract", "resize", "split", "convert", "embed", "info"]
)
def test_pipes_and_devices_are_refused(program, name, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "pipe.ckpt")
    bad, out = tmp_path / name, ("--save_to", tmp_path / "out.safetensors")
    words = {
        "merge": ("merge", "--models", bad, *out),
        "into": ("merge", "--sd_model", SD15, "--models", bad, "--save_to", tmp_path / "out"),
        "model": ("merge", "--sd_model", bad, "--models", LORA, *out),
        "extract": ("extract", "--model_org", SD15, "--model_tuned", bad, *out),
        "resize": ("resize", "--model", bad, *out),
        "split": ("split", "--model", bad, *out),
        "convert": ("convert", "--model", bad, "--format", "kohya", *out),
        "embed": ("convert", "--model", LORA, "--format", "cloneofsimo", "--embeddings", bad, *out),
        "info": ("info", bad),
    }[program]
    said = fails(capsys, *words)
    assert "is a pipe or a device" in said
    assert str(bad) in said


def test_a_pipe_is_no_target(tmp_path, capsys):
    os.mkfifo(tmp_path / "out.safetensors")
    said = fails(capsys, "merge", "--models", LORA, "--save_to", tmp_path / "out.safetensors")
    assert "out.safetensors is a pipe or a device" in said


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "model_index.json"])
def test_a_pipe_among_a_folders_configs_is_not_waited_for(name, tmp_path):
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / name).parent.mkdir(exist_ok=True)
    os.mkfifo(model / name)
    query = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{query}.weight": torch.ones(4, 1024)}, model / "unet" / "diffusion_pytorch_model.safetensors")
    assert Checkpoint.open(model).base_version == "sd_v2"
    one = Adapter({ModuleName("unet", query): LowRank(torch.ones(1, 1024), torch.ones(4, 1), 1.0)})
    one.merge_into(model, tmp_path / "out")
    one.merge_into(model, model)
    assert not (tmp_path / "out" / name).exists()


def repacked(source, target, compressed):
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for member in before.infolist():
            kind = zipfile.ZIP_DEFLATED if compressed(member.filename) else zipfile.ZIP_STORED
            after.writestr(member.filename, before.read(member.filename), compress_type=kind)
    return target


@pytest.mark.parametrize(
    "compressed",
    [lambda name: True, lambda name: False, lambda name: name.endswith("/data/3"), lambda name: "pkl" in name],
)
def test_archives_that_were_compressed_again(compressed, tmp_path):
    tensors = {key: one.bfloat16() if one.is_floating_point() else one for key, one in original("sd1").items()}
    torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
    found, _ = read_tensors(repacked(tmp_path / "a.ckpt", tmp_path / "b.ckpt", compressed))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], one) for key, one in tensors.items())
    one = Adapter({MODULE: LowRank(torch.zeros(1, 32), torch.zeros(32, 1), 1.0)})
    after = load_file(one.merge_into(tmp_path / "b.ckpt", tmp_path / "out.safetensors"))
    assert all(torch.equal(after[key], one) for key, one in tensors.items())


def test_archives_that_unpack_to_far_more_than_they_are(tmp_path, monkeypatch):
    torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "a.ckpt")
    bomb = repacked(tmp_path / "a.ckpt", tmp_path / "b.ckpt", lambda name: True)
    assert torch.equal(read_tensors(bomb)[0]["x"], torch.zeros(1 << 20))  # small enough in any file
    monkeypatch.setattr(files, "_MOST_UNPACKED", 1 << 20)
    with pytest.raises(AdapterError, match=r"b.ckpt would unpack to 0\.0 GB"):
        read_tensors(bomb)
    assert read_tensors(tmp_path / "a.ckpt")[0]["x"].numel() == 1 << 20


def test_an_archive_with_a_password(tmp_path):
    torch.save({"x": torch.zeros(8)}, tmp_path / "a.ckpt")
    content = bytearray((tmp_path / "a.ckpt").read_bytes())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 8] |= 1
        at = content.find(b"PK\x01\x02", at + 1)
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(AdapterError, match="password"):
        read_tensors(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["a.gguf", "a.ckpt"])
def test_a_gguf_file_is_named_so(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    words = ("merge", "--sd_model", tmp_path / name, "--models", LORA, "--save_to", tmp_path / "out.safetensors")
    assert f"{name} is a GGUF file" in fails(capsys, *words)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_views_and_parameters_in_pickles(ending, tmp_path):
    tensors = original("sd1")
    tensors[KEY] = torch.nn.Parameter(tensors[KEY].clone())
    tensors["negated"] = torch.randn(4, dtype=torch.complex64).conj().imag
    tensors["conjugated"] = torch.randn(4, dtype=torch.complex64).conj()
    assert tensors["negated"].is_neg()
    torch.save({"state_dict": tensors}, tmp_path / "in.ckpt")
    one = Adapter({MODULE: LowRank(torch.ones(1, 32), torch.ones(32, 1), 1.0)})
    out = one.merge_into(tmp_path / "in.ckpt", tmp_path / f"out.{ending}")
    after = load_file(out) if ending == "safetensors" else torch.load(out, weights_only=True)["state_dict"]
    for name in ("negated", "conjugated"):
        assert torch.equal(after[name], tensors[name].resolve_conj().resolve_neg())
    torch.testing.assert_close(after[KEY], tensors[KEY].detach() + 1)


@pytest.mark.parametrize("wrapped", [None, "state_dict", "lora"])
def test_a_training_s_notes_beside_tensors(wrapped, tmp_path):
    tensors = {"x.lora_up.weight": torch.ones(2, 1), "x.lora_down.weight": torch.ones(1, 2)}
    notes = {"epoch": 3, "name": "run", "best": None}
    table = {**tensors, "x.alpha": 0.5}
    torch.save({**notes, **table} if wrapped is None else {**notes, wrapped: table}, tmp_path / "in.pt")
    found, _ = read_tensors(tmp_path / "in.pt")
    assert found.keys() == table.keys()
    assert found["x.alpha"] == 0.5
    torch.save({**tensors, "x.y": "text"}, tmp_path / "text.pt")
    with pytest.raises(AdapterError, match=r"x\.y is of the type str \(text\), not a tensor"):
        read_tensors(tmp_path / "text.pt")


def test_a_full_disk_while_a_pickle_is_written(tmp_path, capsys):
    save_file(original("sd1"), tmp_path / "in.safetensors")
    words = ("merge", "--sd_model", tmp_path / "in.safetensors", "--models", LORA, "--save_to", tmp_path / "out.ckpt")
    size = (tmp_path / "in.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # the .safetensors file that is streamed first fits, the archive with its table does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, hard))
        said = fails(capsys, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "out.ckpt cannot be written" in said
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_too_little_memory_is_one_line(tmp_path, capsys):
    """clamp_quantile needs the full matrix: 281 TB of it, more than any address space."""
    side = 1 << 23
    one = LowRank(torch.ones(1, side, dtype=torch.float16), torch.ones(side, 1, dtype=torch.float16), 1.0)
    Adapter({MODULE: one}).save(tmp_path / "a.safetensors")
    words = ("svd-merge", "--models", tmp_path / "a.safetensors", "--clamp_quantile", "0.99")
    assert fails(capsys, *words, "--save_to", tmp_path / "b.safetensors") == "error: there is too little memory\n"


@pytest.mark.parametrize("error", [RuntimeError("first\nsecond"), MemoryError(), RecursionError("deep")])
def test_what_pytorch_raises_is_one_line(error, capsys, monkeypatch):
    def raises(*_):
        raise error

    monkeypatch.setattr("lora_adapters.convert.programs.info.Adapter.load", raises)
    said = fails(capsys, "info", LORA)
    assert said.startswith(f"error: {str(error).splitlines()[0] if str(error) else 'there is too little memory'}")


@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
@pytest.mark.parametrize("ignored", [False, True])
def test_signals_that_end_a_program_leave_nothing(name, ignored, tmp_path, capsys, monkeypatch):
    save_file(original("sd1"), tmp_path / "in.safetensors")
    number, out = getattr(signal, name), tmp_path / "out.safetensors"

    def written_and_signalled(*args):
        stream(*args)
        os.kill(os.getpid(), number)

    monkeypatch.setattr("lora_adapters.convert.storage.weights_writing.stream", written_and_signalled)
    words = ("merge", "--sd_model", tmp_path / "in.safetensors", "--models", LORA, "--save_to", out)
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        if ignored:  # as under nohup
            run(capsys, *words)
        else:
            assert "stopped" in fails(capsys, *words)
        assert signal.getsignal(number) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(number, before)
    assert out.exists() is ignored
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


def test_a_source_that_is_cut_short_is_named(tmp_path):
    source = tmp_path / "in.safetensors"
    save_file(original("sd1"), source)
    opened = Checkpoint.open(source)

    def change(weight):
        os.truncate(source, 1000)
        return weight

    with pytest.raises(AdapterError, match=r"in.safetensors was truncated while it was read"):
        opened.write(tmp_path / "out.safetensors", {MODULE: change})
    with pytest.raises(AdapterError, match=r"in.safetensors changed while it was read"):
        opened.read(MODULE, opened.modules[MODULE])
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_mapped_tensor_whose_file_is_gone_is_named(tmp_path):
    """The system's answer to a write from there is `Bad address`, of which the target knows nothing."""
    save_file({"x": torch.ones(1 << 20)}, tmp_path / "in.safetensors")
    tensor = read_tensors(tmp_path / "in.safetensors")[0]["x"]

    def make():
        os.truncate(tmp_path / "in.safetensors", 0)
        return tensor

    with pytest.raises(AdapterError, match="x cannot be read: its file was truncated"):
        stream(tmp_path / "out.safetensors", {"x": Planned(torch.float32, (1 << 20,), make)}, {})


def test_tensors_that_are_made_late_are_where_the_header_says(tmp_path):
    made = []

    def planned(name, dtype, late):
        def make():
            made.append(name)
            return torch.full((5,), len(made)).to(dtype)

        return Planned(dtype, (5,), make, late)

    plan = {"scale": planned("scale", torch.float32, True), "weight": planned("weight", torch.float8_e4m3fn, False)}
    stream(tmp_path / "a.safetensors", plan, {})
    assert made == ["weight", "scale"]
    assert {name: one.float().tolist() for name, one in load_file(tmp_path / "a.safetensors").items()} == {
        "weight": [1.0] * 5,
        "scale": [2.0] * 5,
    }
    header = (tmp_path / "a.safetensors").read_bytes()
    table = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert table["scale"]["data_offsets"] == [0, 20]


def test_the_norm_of_a_large_rank_needs_little_memory():
    rank = 60_000
    one = LowRank(torch.ones(rank, 2), torch.ones(2, rank), float(rank))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        assert block_norms(Adapter({MODULE: one}))["MID"] == pytest.approx(2 * rank)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_links_by_many_ways_to_one_folder_are_not_walked(tmp_path):
    folders = [tmp_path / "model" / "unet", *(tmp_path / f"f{level}" for level in range(40))]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    for above, below in pairwise(folders):
        for name in ("a", "b"):
            (above / name).symlink_to(below)
    (tmp_path / "model" / "vae").symlink_to(folders[-1])
    found = [file.relative_to(tmp_path / "model") for file in pipeline_files(tmp_path / "model")]
    assert sorted(map(str, found)) == ["unet/config.json", "vae/config.json"]
