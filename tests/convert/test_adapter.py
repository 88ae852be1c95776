"""Adapters in files: every format, round trips, metadata, and what is wrong with bad files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError, DyLora, LowRank, ModuleName
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
    with pytest.raises(AdapterError, match=r"rank 5: valid ranks are 4, 8, 12, 16"):
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
    with pytest.raises(AdapterError, match="alpha must not be 0"):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sorted_lora_is_a_dylora_whose_cuts_are_svd_s(dtype, tmp_path):
    plain = Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors").to(dtype)
    sorted_ = Adapter.load(plain.sorted().save(tmp_path / "sorted.safetensors"))
    assert sorted_.dylora == DyLora(unit=1, rank_scaling="constant")
    exact = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    for rank in (1, 3, sorted_.rank):
        cut, best = sorted_.truncate(rank), plain.svd(rank)
        for module, one in plain.modules.items():
            torch.testing.assert_close(cut.modules[module].delta(), best.modules[module].delta(), **exact)
            assert sorted_.modules[module].down.dtype == dtype
            assert sorted_.modules[module].alpha == one.alpha
    sqrt = plain.as_dylora(DyLora(unit=2, rank_scaling="sqrt"))
    assert sqrt.sorted().dylora == DyLora(unit=2, rank_scaling="constant")


def test_bad_files(tmp_path):
    whole = GOLDEN / "sd15" / "text_encoder_only.safetensors"
    tensors = load_file(whole)
    some = next(key for key in tensors if key.endswith("lora_up.weight"))
    broken = {
        "truncated": ("truncated or not a safetensors", lambda file: file.write_bytes(whole.read_bytes()[:5000])),
        "empty": ("no tensors", lambda file: save_file({}, file)),
        "half": ("no lora_up.weight", lambda file: save_file({k: v for k, v in tensors.items() if k != some}, file)),
        "misnamed": (
            "unknown module.*nearest",
            lambda file: save_file({k.replace("q_proj", "q_porj"): v for k, v in tensors.items()}, file),
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
    with pytest.raises(UnknownFormatError, match=r"it is a LoHa adapter \(lora_unet_\w+\.hada_w1_a\)"):
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

    monkeypatch.setattr("safetensors.torch.save_file", full)
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


QUERY = ModuleName("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")


def of_ones(alpha=1.0, dtype=torch.float32, scale=1.0):
    return Adapter({QUERY: LowRank(torch.full((1, 32), scale).to(dtype), torch.ones(32, 1, dtype=dtype), alpha)})


def test_numbers_too_large_for_the_dtype_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(AdapterError, match=r"attn1.to_q has values that are too large for float16"):
        of_ones(scale=1e10).save(tmp_path / "a.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("alpha", [1e-9, 0.7 * 8, 7e4, 500.0, 11.2])
def test_alpha_is_not_rounded_to_the_weights_dtype(dtype, alpha, tmp_path):
    back = Adapter.load(of_ones(alpha, dtype).save(tmp_path / "a.safetensors"))
    assert back.modules[QUERY].alpha == pytest.approx(alpha, rel=1e-7)


def test_alphas_beyond_float32(tmp_path):
    for form in ("kohya", "lycoris"):
        assert not Adapter.load(of_ones(1e-50).save(tmp_path / "a.safetensors", form)).modules[QUERY].delta().any()
    with pytest.raises(AdapterError, match="alpha 1e\\+50 is too large"):
        of_ones(1e50).save(tmp_path / "b.safetensors")


@pytest.mark.parametrize("place", ["folder", "subfolder", "weights", "renamed"])
def test_a_single_component_of_a_peft_folder(place, tmp_path):
    path = ModuleName("text_encoder_2", "text_model.encoder.layers.0.self_attn.q_proj")
    Adapter({path: LowRank(torch.ones(4, 1280), torch.ones(1280, 4), 2.0)}).save(tmp_path / "peft", "peft")
    folder = tmp_path / "peft" / "text_encoder_2"
    if place == "renamed":
        folder = folder.rename(tmp_path / "mine")
    sources = {"weights": folder / "adapter_model.safetensors", "subfolder": tmp_path / "peft"}
    back = Adapter.load(sources.get(place, folder), subfolder="text_encoder_2" if place == "subfolder" else None)
    assert back.modules[path].alpha == 2


def test_pefts_weights_without_their_config():
    with pytest.raises(UnknownFormatError, match=r"without their adapter_config.json"):
        Adapter.from_tensors({f"base_model.model.{QUERY.path}.lora_A.weight": torch.ones(1, 32)})
    with pytest.raises(UnknownFormatError, match=r"without their adapter_config.json"):
        Adapter.from_tensors({f"base_model.model.{QUERY.path}.hada_w1_a": torch.ones(1, 32)})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_peft_adapters_that_change_the_base_too_are_refused(start, tmp_path):
    of_ones().save(tmp_path, "peft")
    config = tmp_path / "unet" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": start}))
    with pytest.raises(AdapterError, match=f"{start} is not supported: it changes the base weights too"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("name", ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_middle_block_1_proj_in"])
def test_spellings_of_sdxl_tell_the_model(name):
    pair = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}
    adapter = Adapter.from_tensors(pair)
    assert adapter.architecture == "sdxl"


def test_sd2_files_of_kohyas_get_the_shapes_of_the_model(tmp_path):
    proj = ModuleName("unet", "mid_block.attentions.0.proj_in")
    key = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")

    def made(width):
        pair = LowRank(torch.ones(2, 32, 1, 1), torch.ones(32, 2, 1, 1), 2.0)
        return Adapter({proj: pair, key: LowRank(torch.ones(2, width), torch.ones(32, 2), 2.0)})

    for width, dimensions in ((1024, 2), (768, 4), (64, 4)):  # SD2, SD1, and a small model of either
        for format in ("diffusers", "peft"):
            path = made(width).save(tmp_path / f"{width}{format}", format)
            assert Adapter.load(path).modules[proj].down.ndim == dimensions
        assert Adapter.load(made(width).save(tmp_path / "k.safetensors")).modules[proj].down.ndim == 4


def test_a_cut_adapter_in_a_pickle_has_the_cut_only(tmp_path):
    whole = Adapter({QUERY: LowRank(torch.randn(64, 320), torch.randn(320, 64), 1.0)}).as_dylora(DyLora())
    assert whole.truncate(1).save(tmp_path / "a.pt").stat().st_size < 10_000


def test_one_matrix_under_two_names():
    down, up = torch.ones(4, 320), torch.ones(320, 4)
    pairs = {f"unet.{QUERY.path}.lora_A.weight": down, f"unet.{QUERY.path}.lora_B.weight": up}
    with pytest.raises(AdapterError, match="stand for the same matrix"):
        Adapter.from_tensors({**pairs, f"{QUERY.path}.lora.down.weight": down})
    name = "lora_unet_" + QUERY.path.replace(".", "_")
    pairs = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    with pytest.raises(AdapterError, match="stand for the same tensor"):
        Adapter.from_tensors({**pairs, f"{name}.lora_A.weight": down})


def test_old_names_of_text_encoder_layers():
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora"
    tensors = {f"{stem}.down.weight": torch.ones(4, 768), f"{stem}.up.weight": torch.ones(768, 4)}
    (module,) = Adapter.from_tensors(tensors).modules
    assert module == ModuleName("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj")


def test_folding_an_alpha_of_float8_weights_loses_no_more_than_float16(tmp_path):
    up = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.float8_e4m3fn)
    adapter = Adapter({QUERY: LowRank(torch.ones(4, 32).to(torch.float8_e4m3fn), up, 1.0)})
    same(Adapter.load(adapter.save(tmp_path / "a.safetensors", "diffusers")), adapter, 1e-3)


def test_a_tucker_core_is_folded_without_rounding():
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (4, 8, 1, 1), "mid": (4, 4, 3, 3), "up": (8, 4, 1, 1)}
    parts = {kind: torch.randn(*shape, generator=generator).bfloat16() for kind, shape in shapes.items()}
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    (one,) = Adapter.from_tensors({f"{name}.lora_{kind}.weight": part for kind, part in parts.items()}).modules.values()
    down, mid, up = (part.double() for part in parts.values())
    exact = torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    torch.testing.assert_close(one.delta().double().reshape(exact.shape), exact, rtol=1e-5, atol=1e-5)
