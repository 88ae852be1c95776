"""Adapters in files: every format, round trips, metadata, and what is wrong with bad files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, DyLora
from lora_adapters.convert.errors import UnknownFormatError

GOLDEN = Path(__file__).parent.parent / "golden"
FILES = sorted(
    file for part in ("sd15", "sdxl") for file in (GOLDEN / part).glob("*.safetensors") if file.stem != "expected"
)


def same(a, b, tolerance=1e-6):
    assert set(a.modules) == set(b.modules)
    for module, one in a.modules.items():
        torch.testing.assert_close(
            one.delta(), b.modules[module].delta().reshape(one.delta().shape), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_round_trip(file, format, tmp_path):
    adapter = Adapter.load(file)
    again = Adapter.load(adapter.save(tmp_path / ("folder" if format == "peft" else "a.safetensors"), format))
    same(adapter, again, 2e-3 if "16" in file.stem else 1e-6)
    assert again.dylora == adapter.dylora
    assert again.architecture == adapter.architecture


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.stem not in ("lierla_no_alpha", "kohya_svd_merge")],
    ids=lambda file: file.stem,
)
def test_kohya_format_is_bit_exact(file, tmp_path):
    tensors = load_file(file)
    again = load_file(Adapter.load(file).save(tmp_path / "a.safetensors"))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) and tensors[key].dtype == again[key].dtype for key in tensors)


def test_metadata_and_hashes(tmp_path):
    path = Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors").save(tmp_path / "a.safetensors")
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    written = path.read_bytes()
    data = written[8 + int.from_bytes(written[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8]  # the file is smaller than 1 MiB
    assert metadata["ss_network_dim"] == "8"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "1"}
    assert Adapter.load(path).metadata["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize(
    ("name", "rank"),
    [("dylora", 4), ("dylora", 8), ("dylora", 12), ("dylora_conv", 2), ("dylora_conv", 4), ("dylora_conv", 6)],
)
def test_kohyas_dylora_is_cut_as_its_own_script_does(name, rank, tmp_path):
    cut = Adapter.load(GOLDEN / "sd15" / f"{name}.safetensors").truncate(rank).save(tmp_path / "a.safetensors")
    tensors, wanted = load_file(cut), load_file(GOLDEN / "sd15" / f"{name}.kohya_split_{rank:04}.safetensors")
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in tensors)


def test_truncate_lists_the_valid_ranks():
    with pytest.raises(AdapterError, match=r"rank 5 .*: 4, 8, 12, 16"):
        Adapter.load(GOLDEN / "sd15" / "dylora.safetensors").truncate(5)


def test_sum_and_scale():
    a, b = (Adapter.load(GOLDEN / "sd15" / f"{name}.safetensors") for name in ("c3lier", "unet_only"))
    both = a.scale(0.5) + b.scale(2.0)
    for module, one in both.modules.items():
        wanted = 0.5 * a.modules[module].delta() if module in a.modules else 0
        if module in b.modules:
            wanted = wanted + 2 * b.modules[module].delta()
        torch.testing.assert_close(one.delta(), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(AdapterError, match="SDXL"):
        a + Adapter.load(GOLDEN / "sdxl" / "lierla_xl.safetensors")


def test_an_adapter_of_no_effect_is_written_in_every_format(tmp_path):
    none = Adapter.load(GOLDEN / "sd15" / "text_encoder_only.safetensors").scale(0)
    for options in ({}, {"fold_alpha": True}, {"format": "diffusers"}, {"format": "peft"}):
        name = "none" if options.get("format") == "peft" else "none.safetensors"
        again = Adapter.load(none.save(tmp_path / name, **options))
        assert again.modules.keys() == none.modules.keys()
        assert not any(one.delta().any() for one in again.modules.values())
    with pytest.raises(AdapterError, match="alpha of 0"):
        next(iter(none.modules.values())).with_alpha(0)


def test_an_adapter_without_modules_is_one_and_is_not_written(tmp_path):
    empty = Adapter({})
    assert (empty.rank, empty.components, (empty + empty).modules) == (0, (), {})
    assert repr(empty) == "Adapter(0 modules of , rank 0)"
    with pytest.raises(AdapterError, match="no modules"):
        empty.save(tmp_path / "none.safetensors")


def test_fold_alpha_leaves_one_alpha(tmp_path):
    adapter = Adapter.load(GOLDEN / "sd15" / "block_dims_alphas_conv.safetensors")
    path = adapter.save(tmp_path / "a.safetensors", fold_alpha=True)
    assert len({float(tensor) for key, tensor in load_file(path).items() if key.endswith("alpha")}) == 1
    same(adapter, Adapter.load(path))


def test_older_diffusers_names():
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    for prefix in ("", "unet."):
        key = f"{prefix}mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
        adapter = Adapter.from_tensors({f"{key}.down.weight": down, f"{key}.up.weight": up})
        (module,) = adapter.modules
        assert str(module) == "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
        torch.testing.assert_close(adapter.modules[module].delta(), up @ down)


def test_locon_with_a_tucker_core():
    down, mid, up = torch.randn(2, 8, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(8, 2, 1, 1)
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    (one,) = Adapter.from_tensors({**tensors, f"{name}.alpha": torch.tensor(1.0)}).modules.values()
    wanted = 0.5 * torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    torch.testing.assert_close(one.delta(), wanted, rtol=1e-4, atol=1e-5)


def test_dylora_facts_are_kept(tmp_path):
    facts = DyLora(unit=2, rank_scaling="sqrt", freeze_lower=True)
    adapter = Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors").as_dylora(facts)
    assert Adapter.load(adapter.save(tmp_path / "a.safetensors")).dylora == facts


def test_a_plain_lora_is_cut_to_its_first_components_at_their_own_scale():
    whole = Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors")
    for module, one in whole.truncate(3).modules.items():
        before = whole.modules[module]
        assert one.rank == min(3, before.rank)
        assert one.scale == pytest.approx(before.scale)


def test_bad_files(tmp_path):
    whole = GOLDEN / "sd15" / "text_encoder_only.safetensors"
    tensors = load_file(whole)
    some = next(key for key in tensors if key.endswith("lora_up.weight"))
    broken = {
        "truncated": ("truncated or no safetensors", lambda file: file.write_bytes(whole.read_bytes()[:5000])),
        "empty": ("no tensors", lambda file: save_file({}, file)),
        "half": ("no lora_up.weight", lambda file: save_file({k: v for k, v in tensors.items() if k != some}, file)),
        "misnamed": (
            "unknown module.*nearest",
            lambda file: save_file({k.replace("fc1", "fc3"): v for k, v in tensors.items()}, file),
        ),
        "scaling": (
            "rank_scaling 'cubic'",
            lambda file: save_file(
                tensors, file, {"ss_network_module": "networks.dylora", "ss_network_args": '{"rank_scaling": "cubic"}'}
            ),
        ),
        "rank": ("ranks differ", lambda file: save_file({**tensors, some: torch.zeros(24, 3)}, file)),
    }
    for name, (said, make) in broken.items():
        file = tmp_path / f"{name}.safetensors"
        make(file)
        with pytest.raises(AdapterError, match=said) as caught:
            Adapter.load(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(AdapterError, match="does not exist"):
        Adapter.load(tmp_path / "none.safetensors")
    with pytest.raises(UnknownFormatError):
        Adapter.from_tensors({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": torch.zeros(2, 2)})


def test_pickles_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(AdapterError, match="plain weights"):
        Adapter.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_save_leaves_the_target(tmp_path, monkeypatch):
    adapter = Adapter.load(GOLDEN / "sd15" / "text_encoder_only.safetensors")
    path = adapter.save(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_adapters.convert.adapter.safetensors.torch.save_file", full)
    with pytest.raises(AdapterError, match="No space left"):
        adapter.scale(2).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_locon_beyond_the_blocks(tmp_path):
    """LyCORIS adapts the U-Net's outermost layers too, which kohya's trainer leaves alone."""
    names = ("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2")
    tensors = {}
    for name in names:
        kernel = (3, 3) if "conv" in name else ()
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, 4, *kernel)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(6, 2, *(1 for _ in kernel))
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    adapter = Adapter.from_tensors(tensors)
    assert {module.path for module in adapter.modules} == {
        "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"
    }  # fmt: skip
    again = load_file(adapter.save(tmp_path / "a.safetensors"))
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_resize_keeps_scales():
    adapter = Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors")
    less = adapter.resize(4, 2)
    assert all(less.modules[module].scale == pytest.approx(one.scale) for module, one in adapter.modules.items())
    assert less.rank == 4
    assert len({one.rank for one in adapter.resize(8, dynamic=("sv_fro", 0.8)).modules.values()}) > 1
