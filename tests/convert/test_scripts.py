"""The command-line programs of the file tools: what they write."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter
from lora_adapters.convert.formats.metadata import DyLora

from .checkpoints import GOLDEN, original
from .scripts import ROOT, SCRIPTS, SD15, delta_distance, fails, misused, run


@pytest.mark.parametrize("program", SCRIPTS)
def test_every_program_runs_as_a_file_and_needs_no_slow_library(program):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']; sys.path[0] = {str(ROOT / 'convert')!r}\n"
        f"try: runpy.run_path({str(ROOT / 'convert' / SCRIPTS[program])!r} + '.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "slow = {'diffusers', 'transformers', 'peft', 'huggingface_hub', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout or "models" in done.stdout
    assert import_module(f"lora_adapters.convert.{SCRIPTS[program]}").main is not None


def test_merge_of_adapters(tmp_path, capsys):
    out, models = tmp_path / "out.safetensors", [SD15 / "c3lier.safetensors", SD15 / "lierla_bf16.safetensors"]
    said = run(capsys, "merge", "--save_to", out, "--models", *models, "--ratios", "0.5", "-0.25")
    assert "rank 4 to 16" in said
    a, b = map(Adapter.load, models)
    assert delta_distance(Adapter.load(out), a.scale(0.5) + b.scale(-0.25)) < 1e-6
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
        assert opened.get_tensor(opened.keys()[0]).dtype == torch.float32
    assert metadata["modelspec.merged_from"] == "c3lier, lierla_bf16"
    assert metadata["ss_network_dim"] == "16"
    assert "hash: right" in run(capsys, "info", out)
    run(
        capsys,
        "merge",
        "--save_to",
        out,
        "--models",
        *models,
        "--new_rank",
        "3",
        "--precision",
        "fp16",
        "--no_metadata",
    )
    assert {one.rank for one in Adapter.load(out).modules.values()} == {3}
    with safe_open(out, "pt") as opened:
        assert "modelspec.merged_from" not in opened.metadata()
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}


def test_one_adapter_is_weighted_as_float_too(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    run(capsys, "merge", "--save_to", out, "--models", SD15 / "lierla_bf16.safetensors", "--ratios", "0.7")
    whole = Adapter.load(SD15 / "lierla_bf16.safetensors")
    for module, one in Adapter.load(out).modules.items():
        assert one.up.dtype == torch.float32
        torch.testing.assert_close(one.delta(), 0.7 * whole.modules[module].delta(), rtol=1e-6, atol=1e-9)


def test_merge_into_a_model_and_extraction(tmp_path, capsys):
    base, tuned, lora = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "lora"))
    save_file(original("sd1"), base)
    c3lier = SD15 / "c3lier.safetensors"
    run(capsys, "merge", "--sd_model", base, "--save_to", tuned, "--models", c3lier, "--ratios", "0.8")
    said = run(
        capsys, "extract", "--model_org", base, "--model_tuned", tuned, "--save_to", lora, "--dim", 8, "--conv_dim", 4
    )
    assert "text_encoder: largest difference" in said
    assert "relative error: unet" in said
    assert delta_distance(Adapter.load(lora), Adapter.load(c3lier).scale(0.8)) < 1e-5
    assert Adapter.load(lora).metadata["ss_base_model_version"] == "sd_v1"
    assert json.loads(Adapter.load(lora).metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4.0"}
    said = fails(capsys, "merge", "--sd_model", base, "--save_to", tuned, "--models", c3lier, "--v2")
    assert "--v2 requires SD2.x" in said
    assert "the options require sdxl" in fails(
        capsys, "extract", "--model_org", base, "--model_tuned", tuned, "--save_to", lora, "--sdxl"
    )


@pytest.mark.parametrize(("name", "unit"), [("dylora", 4), ("dylora_conv", 2)])
def test_split(name, unit, tmp_path, capsys):
    source = SD15 / f"{name}.safetensors"
    run(capsys, "split", "--model", source, "--save_to", tmp_path / "d.safetensors", "--unit", unit)
    highest = Adapter.load(source).rank
    ranks = [*range(unit, highest + 1, unit)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"d-{rank:04}.safetensors" for rank in ranks]
    for rank in ranks:
        file = tmp_path / f"d-{rank:04}.safetensors"
        golden = source if rank == highest else SD15 / f"{name}.kohya_split_{rank:04}.safetensors"
        tensors, wanted = load_file(file), load_file(golden)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in tensors)
        assert '"hash": "right"' in run(capsys, "info", "--json", file)


def test_split_of_a_plain_lora_that_is_sorted_first(tmp_path, capsys):
    source = SD15 / "c3lier.safetensors"
    run(capsys, "split", "--model", source, "--save_to", tmp_path / "d.safetensors", "--sort", "--ranks", "2")
    best = Adapter.load(source).svd(2)
    for module, one in Adapter.load(tmp_path / "d-0002.safetensors").modules.items():
        assert one.rank == 2
        torch.testing.assert_close(one.delta(), best.modules[module].delta(), rtol=1e-4, atol=1e-6)


def test_split_of_chosen_ranks(tmp_path, capsys):
    adapter = Adapter.load(SD15 / "c3lier.safetensors").as_dylora(DyLora(unit=2))
    source = adapter.save(tmp_path / "in.safetensors")
    run(capsys, "split", "--model", source, "--save_to", tmp_path / "d.safetensors", "--ranks", "6,2")
    assert sorted(file.name for file in tmp_path.glob("d-*")) == ["d-0002.safetensors", "d-0006.safetensors"]
    for module, one in Adapter.load(tmp_path / "d-0002.safetensors").modules.items():
        assert one.rank == 2
        whole = adapter.modules[module]
        assert one.scale == pytest.approx(whole.scale * (whole.rank / 2) ** 0.5)  # rank_scaling "sqrt", the default
    said = fails(capsys, "split", "--model", source, "--save_to", tmp_path / "e.safetensors", "--ranks", "2,3")
    assert "rank 3" in said
    assert "give its --unit" in fails(
        capsys, "split", "--model", SD15 / "c3lier.safetensors", "--save_to", "x.safetensors"
    )
    assert not list(tmp_path.glob("e-*"))
    said = fails(capsys, "split", "--model", SD15 / "dylora.safetensors", "--save_to", "x.safetensors", "--unit", 3)
    assert "unit 3 does not divide the rank 16" in said


def test_resize(tmp_path, capsys):
    source, out = SD15 / "c3lier.safetensors", tmp_path / "out.safetensors"
    before = Adapter.load(source)
    run(capsys, "resize", "--model", source, "--save_to", out, "--new_rank", "4", "--new_conv_rank", "2")
    for module, one in Adapter.load(out).modules.items():
        assert one.rank == (2 if one.kernel == (3, 3) else min(4, *one.out_in))
        assert one.scale == pytest.approx(before.modules[module].scale)
    said = run(capsys, "resize", "--model", source, "--save_to", out, "--new_rank", 8, "--dynamic_method", "sv_fro",
               "--dynamic_param", 0.8, "--verbose")  # fmt: skip
    assert said.count("rank 8 ->") > 100
    assert Adapter.load(out).metadata["ss_network_dim"] == "Dynamic"
    said = run(capsys, "resize", "--model", source, "--save_to", out, "--target_error", 0.4)
    assert float(said.split("largest: ")[1].split()[0]) <= 0.4
    assert "require each other" in misused(
        capsys, "resize", "--model", source, "--save_to", out, "--dynamic_method", "sv_fro"
    )


def cloneofsimo_file(path):
    """An adapter as cloneofsimo/lora writes it, for SD1.5's U-Net: rank 1, attention and GEGLU, and one token."""
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    tensors, metadata = {"<s1>": torch.randn(768)}, {"<s1>": "<embed>", "unet": '["GEGLU", "CrossAttention"]'}
    shapes = []
    for width in widths:  # attn1: q, k, v, out; GEGLU; attn2: q, k, v, out
        shapes += [(width, width)] * 4 + [
            (8 * width, width),
            (width, width),
            (width, 768),
            (width, 768),
            (width, width),
        ]
    for number, (out, into) in enumerate(shapes):
        tensors[f"unet:{number}:up"], tensors[f"unet:{number}:down"] = torch.randn(out, 1), torch.randn(1, into)
        metadata[f"unet:{number}:rank"] = "1"
    save_file(tensors, path, metadata)
    return tensors


def test_cloneofsimos_format_both_ways(tmp_path, capsys):
    source = tmp_path / "in.safetensors"
    tensors = cloneofsimo_file(source)
    run(capsys, "convert", "--model", source, "--save_to", tmp_path / "k.safetensors", "--format", "kohya")
    table = json.loads((GOLDEN / "modules" / "kohya_modules_sd15.json").read_text())
    shapes = {(row[1], row[2]): (row[5], row[4]) for row in table["rows"]}
    adapter = Adapter.load(tmp_path / "k.safetensors")
    assert len(adapter.modules) == 144
    assert all(one.out_in == shapes[module] and one.scale == 1 for module, one in adapter.modules.items())
    embedding = tmp_path / "k.s1.safetensors"
    assert torch.equal(load_file(embedding)["<s1>"], tensors["<s1>"])
    back = tmp_path / "back.safetensors"
    words = [
        "--model",
        tmp_path / "k.safetensors",
        "--save_to",
        back,
        "--format",
        "cloneofsimo",
        "--embeddings",
        embedding,
    ]
    run(capsys, "convert", *words)
    again = load_file(back)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert delta_distance(Adapter.load(source), adapter) == 0


def test_cloneofsimos_format_has_no_place_for_some(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    for model, said in (("sdxl/lierla_xl", "SDXL"), ("sd15/lr_weight_zero_blocks", "cannot skip")):
        words = ["--model", GOLDEN / f"{model}.safetensors", "--save_to", out, "--format", "cloneofsimo"]
        assert said in fails(capsys, "convert", *words)
    source = tmp_path / "in.safetensors"
    tensors = cloneofsimo_file(source)
    for change, said in (
        ({"unet:3:up": None}, "unet:3 is incomplete"),
        ({"unet:3:up": None, "unet:3:down": None}, "positions of unet are missing"),
        ({"unet:144:up": torch.zeros(2, 1), "unet:144:down": torch.zeros(1, 2)}, "no layer"),
    ):
        save_file(
            {key: one for key, one in {**tensors, **change}.items() if one is not None}, tmp_path / "bad.safetensors"
        )
        assert said in fails(capsys, "info", tmp_path / "bad.safetensors")


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "cloneofsimo"])
def test_convert(format, tmp_path, capsys):
    out = tmp_path / ("out" if format == "peft" else "out.safetensors")
    source = SD15 / "lierla.safetensors"
    run(capsys, "convert", "--model", source, "--save_to", out, "--format", format)
    assert delta_distance(Adapter.load(out), Adapter.load(source)) < 1e-6
    run(capsys, "convert", "--model", out, "--save_to", tmp_path / "again.safetensors", "--format", "kohya")
    assert delta_distance(Adapter.load(tmp_path / "again.safetensors"), Adapter.load(source)) < 1e-6


def test_info(tmp_path, capsys):
    (about,) = json.loads(run(capsys, "info", "--json", SD15 / "block_dims_alphas_conv.safetensors"))
    assert about["type"] == "LoRA-C3Lier"
    assert about["for"] == "SD1.x"
    names = [row["block"] for row in about["blocks"]]
    assert names == ["text_encoder", *(f"IN{n:02}" for n in range(1, 12)), "MID", *(f"OUT{n:02}" for n in range(12))]
    adapter = Adapter.load(SD15 / "block_dims_alphas_conv.safetensors")
    text = sum(float(one.delta().square().sum()) for m, one in adapter.modules.items() if m.component != "unet") ** 0.5
    assert about["blocks"][0]["norm"] == pytest.approx(text, rel=1e-4)
    said = run(capsys, "info", SD15 / "dylora.safetensors", GOLDEN / "sdxl" / "lierla_xl.safetensors")
    assert "DyLoRA (unit 4), as LoRA-LierLa for SD1.x" in said
    assert "LoRA-LierLa for SDXL" in said
    file = Adapter.load(SD15 / "lierla.safetensors").save(tmp_path / "a.safetensors")
    bytes_ = bytearray(file.read_bytes())
    bytes_[-1] ^= 1
    file.write_bytes(bytes_)
    assert "hash: wrong" in run(capsys, "info", file)


def test_kohyas_iterations_of_an_approximate_svd_change_nothing(tmp_path, capsys):
    words = ["resize", "--model", SD15 / "lierla.safetensors", "--new_rank", "2", "--save_to"]
    run(capsys, *words, tmp_path / "a.safetensors")
    run(capsys, *words, tmp_path / "b.safetensors", "--svd_lowrank_niter", "7")
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


def test_a_hash_of_lycoris_is_not_called_wrong(tmp_path, capsys):
    """It is of the tensors in the order of the training modules, each alone; the file orders them otherwise."""
    file = tmp_path / "a.safetensors"
    save_file(load_file(SD15 / "lierla.safetensors"), file, {"sshs_model_hash": "0x" + "2495f540" * 8})
    assert "hash: LyCORIS' own" in run(capsys, "info", file)
    (about,) = json.loads(run(capsys, "info", "--json", file))
    assert about["hash"] == "lycoris"


def test_plot(tmp_path, capsys, monkeypatch):
    words = ["info", SD15 / "lierla.safetensors", SD15 / "block_dims.safetensors", "--plot", tmp_path / "a.png"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "needs matplotlib" in fails(capsys, *words)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    run(capsys, *words)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_kohyas_other_flags(tmp_path, capsys):
    lora, out, model = SD15 / "c3lier.safetensors", tmp_path / "out.safetensors", tmp_path / "model.safetensors"
    save_file(original("sd1"), model)
    before = Adapter.load(lora)
    for more in (["--concat"], ["--shuffle"], ["--concat", "--shuffle", "--no_metadata"], ["--precision", "float"]):
        run(capsys, "merge", "--models", lora, lora, "--ratios", "0.25", "0.75", "--save_to", out, *more)
        assert delta_distance(Adapter.load(out), before) < 1e-6
        with safe_open(out, "pt") as opened:
            assert ("modelspec.title" in opened.metadata()) == ("--no_metadata" not in more)
    extract = ["extract", "--model_org", SD15, "--model_tuned", model, "--save_to", out]
    for words, said in (
        (["merge", "--sd_model", model, "--models", lora, "--save_to", out, "--concat"], "--concat is for"),
        (["merge", "--models", lora, "--save_to", out, "--concat", "--new_rank", "2"], "give only one"),
        ([*extract, "--load_precision", "fp16"], "--load_precision is not supported: models are read as they are"),
        ([*extract, "--load_tuned_model_to", "cuda"], "models stay on the disk"),
    ):
        assert said in misused(capsys, *words)


def test_no_program_imports_a_slow_library(tmp_path):
    """Every program at its work, where importing one of them fails."""
    lora, out = SD15 / "c3lier.safetensors", tmp_path / "out.safetensors"
    lines = [
        ["merge", "--models", lora, lora, "--save_to", out],
        ["merge", "--sd_model", SD15, "--models", lora, "--save_to", tmp_path / "merged"],
        ["extract", "--model_org", SD15, "--model_tuned", tmp_path / "merged", "--save_to", out],
        ["svd-merge", "--models", lora, "--save_to", out],
        ["split", "--model", SD15 / "dylora.safetensors", "--save_to", out],
        ["resize", "--model", lora, "--save_to", out],
        ["convert", "--model", lora, "--save_to", tmp_path / "peft", "--format", "peft"],
        ["info", lora, "--json"],
    ]
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'peft', 'accelerate', 'huggingface_hub'): sys.modules[name] = None\n"
        "from lora_adapters.cli import main\n"
        f"for line in {[[str(word) for word in line] for line in lines]!r}: assert main(line) == 0, line"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_console_program_lists_its_programs(capsys):
    listed = run(capsys, "--help")
    assert all(program in listed for program in SCRIPTS)
