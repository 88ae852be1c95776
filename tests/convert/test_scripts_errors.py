"""The command-line programs of the file tools: one line for whatever goes wrong, and the target as it was."""

import ctypes
import os
import struct
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter

from .checkpoints import GOLDEN, original
from .scripts import SD15, fails, misused, run


def hostile(path, kind):
    """A broken or hostile adapter file."""
    whole = load_file(SD15 / "text_encoder_only.safetensors")
    up = next(key for key in whole if key.endswith("lora_up.weight"))
    alpha, down = up.replace("lora_up.weight", "alpha"), up.replace("lora_up", "lora_down")
    raw = (SD15 / "text_encoder_only.safetensors").read_bytes()
    header = b'{"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
    huge = header % (1 << 60, 1 << 62)
    by_bytes = {
        "truncated": raw[:3000],
        "header too long": struct.pack("<Q", 1 << 62) + raw[8:],
        "header no json": struct.pack("<Q", 8) + b"notjson!" + raw[8:],
        "huge sizes": struct.pack("<Q", len(huge)) + huge,
        "offsets lie": struct.pack("<Q", len(header % (4, 8))) + header % (4, 8) + b"12345678",
        "nothing": b"",
    }
    by_tensors = {
        "nan": {up: torch.full_like(whole[up], float("nan"))},
        "half pair": {up: None},
        "rank 0": {up: torch.zeros(len(whole[up]), 0), down: torch.zeros(0, 32)},
        "integers": {up: torch.ones(whole[up].shape, dtype=torch.int32)},
        "torn alpha": {alpha: torch.tensor([1.0, 2.0, 3.0])},
        "alpha 0": {alpha: torch.tensor(0.0)},
        "alpha nan": {alpha: torch.tensor(float("nan"))},
        "zero size": {up: torch.zeros(0, 0)},
        "same module twice": {key.replace("lora_te_", "lora_te1_"): whole[key].clone() for key in (up, down)},
    }
    if kind in by_bytes:
        path.write_bytes(by_bytes[kind])
    elif kind in by_tensors:
        save_file({key: one for key, one in {**whole, **by_tensors[kind]}.items() if one is not None}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "no permission":
        save_file(whole, path)
        path.chmod(0)
    return path


KINDS = (
    "missing", "truncated", "header too long", "header no json", "huge sizes", "offsets lie", "nothing", "nan",
    "half pair", "rank 0", "integers", "torn alpha", "alpha 0", "alpha nan", "zero size", "same module twice", "folder",
    "no permission",
)  # fmt: skip


@contextmanager
def without_privileges():
    """root as an ordinary user to files: without the capabilities to read and write everything (Linux)."""
    if os.name == "nt":
        pytest.skip("Windows asks others for permission")
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    effective = data[0]
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = effective
        assert libc.capset(header, data) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", ["merge", "svd-merge", "resize", "split", "convert", "into model"])
def test_bad_adapters_are_one_line_and_leave_the_target(kind, program, tmp_path, capsys):
    bad, out = hostile(tmp_path / "bad.safetensors", kind), tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    words = {
        "merge": ["merge", "--models", bad],
        "svd-merge": ["svd-merge", "--models", bad],
        "resize": ["resize", "--model", bad],
        "split": ["split", "--model", bad, "--unit", "2"],
        "convert": ["convert", "--model", bad, "--format", "diffusers"],
        "into model": ["merge", "--sd_model", tmp_path / "model.safetensors", "--models", bad],
    }[program]
    if program == "into model":
        save_file(original("sd1"), tmp_path / "model.safetensors")
    with without_privileges() if kind == "no permission" else nullcontext():
        said = fails(capsys, *words, "--save_to", out)
    assert "bad.safetensors" in said
    assert out.read_bytes() == b"before"
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


@pytest.mark.parametrize("kind", ["truncated", "header too long", "offsets lie", "evil", "empty pickle", "no tensors"])
@pytest.mark.parametrize("program", ["merge", "extract"])
def test_bad_models_are_one_line_and_leave_the_target(kind, program, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    pickled = kind in ("evil", "empty pickle", "no tensors")
    bad, out = tmp_path / ("bad.ckpt" if pickled else "bad.safetensors"), tmp_path / "out.safetensors"
    if kind == "evil":
        torch.save({"state_dict": {"model.diffusion_model.x": Evil()}}, bad)
    elif kind == "no tensors":
        torch.save({"state_dict": [1, 2]}, bad)
    elif kind == "empty pickle":
        bad.write_bytes(b"")
    else:
        hostile(bad, kind)
    out.write_bytes(b"before")
    lora = SD15 / "lierla.safetensors"
    words = ["--sd_model", bad, "--models", lora] if program == "merge" else ["--model_org", SD15, "--model_tuned", bad]
    assert str(bad) in fails(capsys, program, *words, "--save_to", out)
    assert out.read_bytes() == b"before"
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_and_ctrl_c_leave_the_target(tmp_path, capsys, monkeypatch):
    model, out, folder = tmp_path / "model.safetensors", tmp_path / "out.safetensors", tmp_path / "folder"
    save_file(original("sd1"), model)
    (folder / "unet").mkdir(parents=True)
    targets = (out, tmp_path / "out.ckpt", folder / "unet" / "config.json", folder / "model_index.json")
    for target in targets:
        target.write_bytes(b"before")
    before = sorted(tmp_path.rglob("*"))
    for reason, said in ((OSError(28, "No space left on device"), "No space left"), (KeyboardInterrupt(), "stopped")):

        def sync(file, reason=reason):
            assert file.stat().st_size > 100000  # what is written so far is there, under another name
            raise reason

        monkeypatch.setattr("lora_adapters.convert.storage.atomic.sync", sync)
        for source, target in ((model, out), (model, tmp_path / "out.ckpt"), (SD15, folder)):
            words = ["--sd_model", source, "--save_to", target, "--models", SD15 / "lierla.safetensors"]
            assert said in fails(capsys, "merge", *words)
    assert all(target.read_bytes() == b"before" for target in targets)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_set_of_files_is_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    import safetensors.torch

    real, calls = safetensors.torch.save_file, []

    def save(*words):
        calls.append(words)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*words)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    split = ["split", "--model", SD15 / "dylora.safetensors", "--save_to", tmp_path / "new" / "d.safetensors"]
    assert "No space left" in fails(capsys, *split)
    assert list(tmp_path.iterdir()) == []  # two of four ranks were written by then
    calls[:] = [()]
    peft = ["convert", "--model", SD15 / "lierla.safetensors", "--save_to", tmp_path / "peft", "--format", "peft"]
    assert "No space left" in fails(capsys, *peft)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    run(capsys, *peft)
    unet = ["convert", "--model", SD15 / "unet_only.safetensors", "--save_to", tmp_path / "peft", "--format", "peft"]
    run(capsys, *unet)  # nothing of what was there before is mixed into it
    assert Adapter.load(tmp_path / "peft").components == ("unet",)


def test_a_folder_that_may_not_be_written_to(tmp_path, capsys):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    lora, out = SD15 / "lierla.safetensors", tmp_path / "locked" / "out.safetensors"
    with without_privileges():
        assert "Permission denied" in fails(capsys, "merge", "--models", lora, "--save_to", out)
        assert "Permission denied" in fails(
            capsys, "merge", "--sd_model", SD15, "--models", lora, "--save_to", out.with_suffix("")
        )
    assert list((tmp_path / "locked").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_get_the_permissions_of_the_users_umask(tmp_path, capsys):
    before = os.umask(0o027)
    try:
        run(capsys, "merge", "--models", SD15 / "lierla.safetensors", "--save_to", tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_what_an_alpha_of_zero_is_has_to_be_said(tmp_path, capsys):
    bad, out = hostile(tmp_path / "bad.safetensors", "alpha 0"), tmp_path / "out.safetensors"
    words = ["convert", "--model", bad, "--save_to", out, "--format", "kohya"]
    assert "--zero_alpha" in fails(capsys, *words)
    assert "alpha is 0 in 1 modules" in run(capsys, "info", bad)
    whole = Adapter.load(SD15 / "text_encoder_only.safetensors")
    run(capsys, *words, "--zero_alpha", "none")
    (silent,) = [module for module, one in Adapter.load(out).modules.items() if not one.delta().any()]
    run(capsys, *words, "--zero_alpha", "rank")
    one = Adapter.load(out).modules[silent]
    assert one.scale == 1
    assert torch.equal(one.up, whole.modules[silent].up)


def test_wrong_options_are_one_line(tmp_path, capsys):
    lora, out = SD15 / "lierla.safetensors", tmp_path / "out.safetensors"
    for words, said in (
        (["merge"], "required"),
        (["merge", "--save_to", "out.txt", "--models", lora], "out.txt must have the ending"),
        (["merge", "--save_to", out, "--models", lora, lora, "--ratios", "1"], "2 models, but 1 ratios"),
        (["merge", "--save_to", out, "--models", lora, "--ratios", "x"], "invalid number"),
        (["merge", "--save_to", tmp_path, "--models", lora], "ending"),
        (["svd-merge", "--save_to", out, "--models", lora, "--ratios", "nan"], "invalid number value: 'nan'"),
        (
            ["split", "--model", SD15 / "dylora.safetensors", "--save_to", out, "--unit", "0"],
            "--unit must be at least 1",
        ),
        (["convert", "--model", lora, "--save_to", out, "--format", "other"], "invalid choice"),
        (["svd-merge", "--save_to", out, "--models", lora, "--new_rank", "0"], "at least 1, got 0"),
        (["merge", "--save_to", out, "--models", lora, "--new_rank", "0"], "rank must be at least 1, got 0"),
    ):
        assert said in misused(capsys, *words)
    for words, said in (
        (["merge", "--save_to", out, "--models", lora, GOLDEN / "sdxl" / "lierla_xl.safetensors"], "SDXL"),
        (["svd-merge", "--save_to", out, "--models", lora, "--device", "nonsense"], "device nonsense"),
        (["svd-merge", "--save_to", out, "--models", lora, "--lbws", "[1,2]"], "2 block weights"),
        (["svd-merge", "--save_to", out, "--models", lora, "--lbws", "1,nan"], "block weights are a list of numbers"),
        (
            ["svd-merge", "--save_to", out, "--models", lora, "--lbws", 5000 * "["],
            "block weights are a list of numbers",
        ),
        (["info", tmp_path / "none.safetensors"], "does not exist"),
    ):
        assert said in fails(capsys, *words)
    assert not out.exists()
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in fails(
        capsys, "merge", "--save_to", tmp_path / "file" / "x.safetensors", "--models", lora
    )


def test_a_device_without_float64_is_refused(tmp_path, capsys, monkeypatch):
    """As Apple's is."""
    real = torch.empty

    def empty(*size, dtype=None, device=None):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return real(*size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    words = ["--model", SD15 / "lierla.safetensors", "--save_to", tmp_path / "x.safetensors", "--new_rank", "1"]
    assert "device mps cannot be used (Cannot convert a MPS" in fails(capsys, "resize", *words, "--device", "mps")
    assert not list(tmp_path.iterdir())
