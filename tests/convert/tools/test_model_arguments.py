"""Weights and block weights behind the names of adapters, A1111's tags, presets and names of blocks."""

import re
from pathlib import Path

import pytest
import torch

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.tools.block_weights import BLOCKS, block_name, parse, weighted
from lora_adapters.convert.tools.model_arguments import ModelArgument, read_arguments
from tests.convert.checkpoints import GOLDEN
from tests.convert.scripts import SD15, delta_distance, misused, run

C3LIER = SD15 / "c3lier.safetensors"
# The extension's own table, of the 17 blocks that have attention.
PRESETS = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
}


def factors(adapter, found):
    """What each module's alpha was multiplied with, by block."""
    return {
        block_name(module, adapter.architecture): one.alpha / adapter.modules[module].alpha
        for module, one in found.modules.items()
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_extensions(preset):
    lierla = Adapter.load(SD15 / "lierla.safetensors")
    wanted = weighted(lierla, [float(number) for number in PRESETS[preset].split(",")])
    assert factors(lierla, weighted(lierla, parse(preset))) == factors(lierla, wanted)


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("IN02", {"IN02"}),
        ("IN2", {"IN02"}),
        ("MID", {"MID"}),
        ("M00", {"MID"}),
        ("BASE MID", {"BASE", "MID"}),
        ("IN04-MID", {"IN04", "IN05", "IN06", "IN07", "IN08", "IN09", "IN10", "IN11", "MID"}),
        ("NOT IN04-OUT11", {"BASE", "IN00", "IN01", "IN02", "IN03"}),
        ("NIN02", {*BLOCKS} - {"IN02"}),
        ("NMID", {*BLOCKS} - {"MID"}),
    ],
)
def test_names_of_blocks(text, blocks):
    adapter = Adapter.load(C3LIER)
    for name, factor in factors(adapter, weighted(adapter, parse(text))).items():
        assert factor == (1.0 if {"text_encoder": "BASE"}.get(name, name) in blocks else 0.0), name


def test_sdxls_blocks_have_their_own_numbers():
    """IN00 to IN08, as the extension names them; the middle's three parts are one block."""
    adapter = Adapter.load(GOLDEN / "sdxl" / "c3lier_xl.safetensors")
    found = weighted(adapter, parse("IN07 MID"))
    for module, one in found.modules.items():
        inside = module.component == "unet" and module.path.startswith(("down_blocks.2.attentions.0", "mid_block"))
        inside = inside or module.path.startswith("down_blocks.2.resnets.0")
        assert one.alpha == (adapter.modules[module].alpha if inside else 0), module


@pytest.mark.parametrize("text", ["IN12", "OUT99", "MIDDD", "dwon", "IN02-", "NOT", "1,x"])
def test_what_is_no_block_is_named(text):
    with pytest.raises(AdapterError, match="block") as raised:
        parse(text)
    assert "MIDD" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "source", "weights"),
    [
        ("x.safetensors", "x.safetensors", (None, None)),
        ("x.safetensors:0.8", "x.safetensors", (0.8, 0.8)),
        ("x.safetensors:-1", "x.safetensors", (-1.0, -1.0)),
        ("x.safetensors:0.8:0.5", "x.safetensors", (0.8, 0.5)),
        ("owner/name:0.8", "owner/name", (0.8, 0.8)),
        (r"C:\x.safetensors:0.8", r"C:\x.safetensors", (0.8, 0.8)),
        (r"C:\x.safetensors", r"C:\x.safetensors", (None, None)),
        ("C:/a/x.safetensors:0.8:lbw=ALL", "C:/a/x.safetensors", (0.8, 0.8)),
        ("a:b.safetensors", "a:b.safetensors", (None, None)),
        ("a:b.safetensors:0.5", "a:b.safetensors", (0.5, 0.5)),
        ("<lora:x:0.8>", "x", (0.8, 0.8)),
        ("<lora:x>", "x", (None, None)),
        ('<lora:"my lora":0.8:0.5>', "my lora", (0.8, 0.5)),
        ("<lyco:x:te=0.5:unet=0.75>", "x", (0.5, 0.75)),
        ("<lora:x:unet=0.75>", "x", (0.75, 0.75)),
        (r"<lora:C:\x.safetensors:0.8>", r"C:\x.safetensors", (0.8, 0.8)),
    ],
)
def test_what_an_argument_says(text, source, weights):
    (one,) = read_arguments([text])
    assert (one.source, (one.text, one.unet)) == (source, weights)


def test_block_weights_of_an_argument():
    for text in ("x:0.8:lbw=MIDD", "x:lbw=MIDD:0.8", "<lora:x:0.8:lbw=MIDD>", "<lora:x:0.8:MIDD>", "x:0.8:MIDD"):
        (one,) = read_arguments([text])
        assert (one.source, one.unet) == ("x", 0.8), text
        assert one.blocks == parse("MIDD"), text
    numbers = ",".join(["1", *["0"] * 15, "0.5"])
    for text in (f"<lora:x:1:lbw={numbers}>", f"<lora:x:1:{numbers}>"):
        (one,) = read_arguments([text])
        assert [*one.blocks.values()] == [1.0, *[0.0] * 15, 0.5]
        assert one.blocks.rest == 0  # blocks that the extension's list has no place for


def test_several_tags_and_files_without_their_endings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.safetensors").touch()
    (tmp_path / "c:0.5").touch()
    found = read_arguments(["<lora:a:1> <lora:b:0.5>", "c:0.5"])
    assert [(one.source, one.unet) for one in found] == [("a", 1.0), ("b.safetensors", 0.5), ("c:0.5", None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a cat <lora:x:1>", "'a cat'"),
        ("<lora:x:1:stop=10>", "stop= depends on sampling steps"),
        ("x:1:strength=2", "unknown option strength="),
        ("<lora::1>", "has no adapter name"),
        ("<lora:x:te=high>", "high"),
        ("<lora:x:1:lbw=[1,2]>", "2 block weights"),
        ("<lora:x:1:1:MIDD:OUTD>", "'OUTD' cannot be parsed"),
        ("<lora:x:inf>", "no block or preset|block weights"),
    ],
)
def test_what_cannot_be_read_is_named(text, said):
    with pytest.raises(AdapterError, match=said) as raised:
        read_arguments([text])
    assert text[:10] in str(raised.value)


def test_weights_of_the_text_encoders_and_the_unet():
    adapter = Adapter.load(SD15 / "lierla.safetensors")
    found, ratio = ModelArgument("x", 0.5, 0.25).applied(adapter)
    assert ratio == 1
    for module, one in found.modules.items():
        assert one.alpha == adapter.modules[module].alpha * (0.25 if module.component == "unet" else 0.5)
    assert ModelArgument("x", 0.5, 0.5).applied(adapter) == (adapter, 0.5)


def test_the_programs_read_them(tmp_path, capsys, monkeypatch):
    a, out, wanted = Adapter.load(C3LIER), tmp_path / "out.safetensors", tmp_path / "wanted.safetensors"
    run(capsys, "merge", "--save_to", wanted, "--models", C3LIER, "--ratios", "0.8", "--lbws", "MIDD")
    for words in ([f"{C3LIER}:0.8:lbw=MIDD"], [f"<lora:{C3LIER.with_suffix('')}:0.8:lbw=MIDD>"]):
        run(capsys, "merge", "--save_to", out, "--models", *words)
        assert delta_distance(Adapter.load(out), Adapter.load(wanted)) == 0
    silent = {block_name(module, "sd") for module, one in Adapter.load(out).modules.items() if not one.delta().any()}
    assert "IN01" in silent
    assert "MID" not in silent
    run(capsys, "merge", "--save_to", out, "--models", f"{C3LIER}:0.5:0.25")
    for module, one in Adapter.load(out).modules.items():
        ratio = 0.25 if module.component == "unet" else 0.5
        torch.testing.assert_close(one.delta(), a.modules[module].delta() * ratio)
    said = misused(capsys, "merge", "--save_to", out, "--models", f"{C3LIER}:0.5", "--ratios", "1")
    assert "--ratios" in said
    said = misused(capsys, "svd-merge", "--save_to", out, "--models", f"{C3LIER}:lbw=MIDD", "--lbws", "ALL")
    assert "--lbws" in said
    shown = run(capsys, "svd-merge", "--save_to", out, "--models", f"{C3LIER}:0.5", "--new_rank", "2")
    assert re.search(r"rank 2\b", shown)


def test_a_module_outside_of_the_blocks_follows_the_rest():
    module = ModuleName("unet", "conv_in")
    adapter = Adapter({module: LowRank(torch.ones(1, 4, 3, 3), torch.ones(8, 1, 1, 1), 1.0)})
    assert weighted(adapter, parse("ALL0.5")).modules[module].alpha == 0.5
    assert weighted(adapter, parse("MIDD")).modules[module].alpha == 0
    assert weighted(adapter, [2.0] * 17).modules[module].alpha == 1  # as kohya's lists leave it


def test_a_model_that_is_there_wins_over_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x:0.8").mkdir()
    assert read_arguments(["x:0.8"]) == [ModelArgument("x:0.8")]
