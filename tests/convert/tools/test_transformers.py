"""The file tools on adapters and models of diffusion transformers, against dense arithmetic."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import (
    convert_format,
    extract_lora_from_dylora,
    extract_lora_from_models,
    info,
    merge_lora,
    resize_lora,
    svd_merge_lora,
)
from lora_adapters.convert.adapter import Adapter
from lora_adapters.convert.formats.metadata import DyLora
from tests.convert.families.transformer_names import LAYERS, H, deltas, pairs
from tests.convert.formats.test_spelled import ORIGINAL, TOLD, file_of


def lora(path, family, seed=0, rank=3):
    made = pairs(family, rank, seed)
    save_file(file_of(made, ORIGINAL["kohya"]), path, {"ss_base_model_version": TOLD[family]})
    return deltas(family, made)


def model(path, family, prefix="", seed=9):
    """An original checkpoint with every layer, and a tensor that no adapter changes."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: (rows, columns) for name, (rows, columns, _) in LAYERS[family].items()}
    tensors = {f"{prefix}{name}.weight": torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    extra = {"sd3": "joint_blocks.0.x_block.attn.ln_q.weight", "qwen_image": "transformer_blocks.0.img_mod.1.bias"}
    marks = {
        "flux": "vector_in.in_layer.bias",
        "chroma": "distilled_guidance_layer.norms.0.scale",
        "flux2": "double_stream_modulation_img.x",
        "lumina2": "layers.0.adaLN_modulation.1.bias",
        "zimage": "layers.0.adaLN_modulation.0.bias",
    }
    tensors[f"{prefix}{(extra | marks)[family]}"] = torch.randn(3, generator=draw)
    save_file(tensors, path)
    return tensors


def whole(family, changes):
    """The changes of the original code's layers: the reverse of what the reader does, by the table of the tests."""
    found = {}
    for name, (rows, columns, paths) in LAYERS[family].items():
        found[name] = torch.zeros(rows, columns)
        for path, spans in paths.items():
            at = 0
            for span in spans:
                count = span.stop - span.start
                found[name][span] = changes[path][at : at + count]
                at += count
    return found


def changes_of(path):
    return {module.path: change.delta() for module, change in Adapter.load(path).modules.items()}


def run(program, *args):
    assert program.main([str(arg) for arg in args]) == 0


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", LAYERS)
def test_merged_into_an_original_checkpoint(family, prefix, tmp_path):
    changes, base = lora(tmp_path / "a.safetensors", family), model(tmp_path / "m.safetensors", family, prefix)
    arguments = ("--sd_model", tmp_path / "m.safetensors", "--models", tmp_path / "a.safetensors", "--ratios", "0.5")
    run(merge_lora, *arguments, "--save_to", tmp_path / "out.safetensors")
    merged, wanted = load_file(tmp_path / "out.safetensors"), whole(family, changes)
    assert set(merged) == set(base)
    for key, tensor in base.items():
        name = key.removeprefix(prefix).removesuffix(".weight")
        if name in wanted and key.endswith(".weight"):
            torch.testing.assert_close(merged[key], tensor + 0.5 * wanted[name], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(merged[key], tensor)


def adapted(family, name):
    """Whether kohya's trainers adapt a layer: what an extraction covers."""
    outer = {"zimage": ("adaLN", "_refiner"), "qwen_image": ("_mod.",)}.get(family, ())
    inside = "blocks." in name or "layers." in name or "_refiner." in name or (family == "lumina2" and "final" in name)
    return inside and "distilled" not in name and not any(part in name for part in outer)


@pytest.mark.parametrize("family", LAYERS)
def test_extracted_from_original_checkpoints(family, tmp_path):
    changes, base = lora(tmp_path / "a.safetensors", family), model(tmp_path / "m.safetensors", family)
    wanted = whole(family, changes)
    save_file(
        {key: t + wanted.get(key.removesuffix(".weight"), 0) for key, t in base.items()}, tmp_path / "t.safetensors"
    )
    arguments = ("--model_org", tmp_path / "m.safetensors", "--model_tuned", tmp_path / "t.safetensors", "--dim", "8")
    run(extract_lora_from_models, *arguments, "--save_to", tmp_path / "e.safetensors")
    found = Adapter.load(tmp_path / "e.safetensors")
    assert found.architecture == family
    inside = {path for name, (_, _, paths) in LAYERS[family].items() if adapted(family, name) for path in paths}
    assert {module.path for module in found.modules} == inside
    for module, change in found.modules.items():
        torch.testing.assert_close(change.delta(), changes[module.path], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_sums_and_smaller_ranks(family, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    first, second = lora(files[0], family, 0), lora(files[1], family, 1, rank=2)
    wanted = {path: 0.5 * first[path] - second[path] for path in first}
    both = ("--models", *files, "--ratios", "0.5", "-1")
    run(merge_lora, *both, "--save_to", tmp_path / "sum.safetensors")
    run(svd_merge_lora, *both, "--new_rank", H, "--save_to", tmp_path / "svd.safetensors")
    for name in ("sum", "svd"):
        for path, change in changes_of(tmp_path / f"{name}.safetensors").items():
            torch.testing.assert_close(change, wanted[path], atol=1e-3, rtol=1e-3)
    run(resize_lora, "--model", files[0], "--new_rank", "1", "--save_to", tmp_path / "small.safetensors")
    for module, pair in Adapter.load(tmp_path / "small.safetensors").modules.items():
        left, values, right = torch.linalg.svd(first[module.path], full_matrices=False)
        torch.testing.assert_close(pair.delta(), left[:, :1] * values[0] @ right[:1], atol=1e-2, rtol=1e-2)


def test_a_dylora_is_split(tmp_path):
    lora(tmp_path / "a.safetensors", "flux")
    adapter = Adapter.load(tmp_path / "a.safetensors").as_dylora(DyLora(unit=1))
    adapter.save(tmp_path / "d.safetensors")
    run(extract_lora_from_dylora, "--model", tmp_path / "d.safetensors", "--save_to", tmp_path / "r.safetensors")
    wanted = Adapter.load(tmp_path / "d.safetensors").truncate(2)
    for module, change in Adapter.load(tmp_path / "r-0002.safetensors").modules.items():
        torch.testing.assert_close(change.delta(), wanted.modules[module].delta())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_converted_there_and_back_and_described(format, tmp_path, capsys):
    changes = lora(tmp_path / "a.safetensors", "sd3")
    source = tmp_path / "a.safetensors"
    for number, one in enumerate((format, "kohya")):
        run(convert_format, "--model", source, "--format", one, "--save_to", tmp_path / f"{number}.safetensors")
        source = tmp_path / f"{number}.safetensors"
    for path, change in changes_of(source).items():
        torch.testing.assert_close(change, changes[path], atol=1e-5, rtol=1e-5)
    capsys.readouterr()
    run(info, source)
    said = capsys.readouterr().out
    assert "SD3.5 medium" in said
    assert "J02" in said


def test_a_model_of_another_family_is_refused(tmp_path, capsys):
    lora(tmp_path / "a.safetensors", "sd3")
    model(tmp_path / "m.safetensors", "flux")
    arguments = ("--sd_model", tmp_path / "m.safetensors", "--models", tmp_path / "a.safetensors")
    assert merge_lora.main([*map(str, arguments), "--save_to", str(tmp_path / "out.safetensors")]) == 1
    assert "is for SD3.5 medium, but" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
