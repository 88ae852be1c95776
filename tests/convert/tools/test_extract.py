"""Adapters extracted from two models."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, AdapterError
from lora_adapters.convert.deltas import Kronecker
from lora_adapters.convert.deltas.dense_svd import best_approximation
from lora_adapters.convert.deltas.rank_choice import by_error, fixed
from lora_adapters.convert.storage.checkpoint import Checkpoint
from lora_adapters.convert.tools.extract import extract
from tests.convert.checkpoints import GOLDEN, original
from tests.convert.scripts import misused, run


def distance(found, wanted, modules=None):
    lost = whole = 0.0
    for module in modules or wanted.modules:
        exact = wanted.modules[module].delta(dtype=torch.float64)
        got = (
            found.modules[module].delta(dtype=torch.float64).reshape(exact.shape)
            if module in found.modules
            else 0 * exact
        )
        lost, whole = lost + float((got - exact).square().sum()), whole + float(exact.square().sum())
    return (lost / whole) ** 0.5


@pytest.fixture
def tuned(tmp_path):
    """The tiny model with c3lier in it, at full precision."""
    adapter = Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors")
    return adapter, adapter.merge_into(GOLDEN / "sd15", tmp_path / "tuned")


def test_what_was_merged_comes_back(tuned):
    adapter, folder = tuned
    found = extract(GOLDEN / "sd15", folder, 8, 4)
    assert distance(found.adapter, adapter) < 1e-5
    assert {module: one.rank for module, one in found.adapter.modules.items() if one.kernel == (3, 3)} == {
        module: one.rank for module, one in adapter.modules.items() if one.kernel == (3, 3)
    }
    again = Adapter.from_difference(GOLDEN / "sd15", folder, 8)
    assert all(module.component != "unet" or ".attentions." in module.path for module in again.modules)


@pytest.mark.parametrize("rank", [1, 3])
def test_merging_what_was_extracted_gives_the_tuned_model_to_the_error_reported(tuned, tmp_path, rank):
    _, folder = tuned
    found = extract(GOLDEN / "sd15", folder, rank, rank)
    merged = Checkpoint.open(found.adapter.merge_into(GOLDEN / "sd15", tmp_path / "again"))
    base, wanted = Checkpoint.open(GOLDEN / "sd15"), Checkpoint.open(folder)
    for module, fit in found.fits.items():
        change = (wanted.weight(module) - base.weight(module)).double().norm()
        missing = (wanted.weight(module) - merged.weight(module)).double().norm()
        assert fit.error == pytest.approx(float(missing / change), rel=2e-3, abs=1e-4)


def test_files_and_folders_in_any_combination(tuned, tmp_path):
    adapter, folder = tuned
    save_file(original("sd1"), tmp_path / "base.safetensors")
    torch.save({"state_dict": load_file(adapter.merge_into(tmp_path / "base.safetensors", tmp_path / "a.safetensors"))},
               tmp_path / "tuned.ckpt")  # fmt: skip
    for base in (GOLDEN / "sd15", tmp_path / "base.safetensors"):
        for other in (folder, tmp_path / "tuned.ckpt"):
            assert distance(extract(base, other, 8, 4).adapter, adapter) < 1e-5


def test_a_text_encoder_is_left_out_only_if_it_is_the_same(tmp_path):
    adapter = Adapter.load(GOLDEN / "sd15" / "text_encoder_only.safetensors").scale(1e-4)
    folder = adapter.merge_into(GOLDEN / "sd15", tmp_path / "text")
    unet = Adapter.load(GOLDEN / "sd15" / "unet_only.safetensors")
    both = unet.merge_into(folder, tmp_path / "both")
    found = extract(GOLDEN / "sd15", both, 4)
    assert found.left_out == ()
    assert 0 < found.largest["text_encoder"] < 0.01
    assert "text_encoder" in found.adapter.components
    left = extract(GOLDEN / "sd15", both, 4, min_diff=0.01)
    assert left.left_out == ("text_encoder",)
    assert left.adapter.components == ("unet",)
    same = extract(folder, both, 4)
    assert same.left_out == ("text_encoder",)
    assert same.largest == {"text_encoder": 0.0}
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(both, both, 4)


def test_target_error(tuned):
    adapter, folder = tuned
    found = extract(GOLDEN / "sd15", folder, None, 8, target_error=0.3)
    assert max(fit.error for fit in found.fits.values()) <= 0.3 + 1e-6
    ranks = {one.rank for one in found.adapter.modules.values()}
    assert len(ranks) > 1
    assert max(ranks) < 8
    assert distance(found.adapter, adapter) < 0.3


def test_the_difference_itself(tuned, tmp_path, capsys):
    adapter, folder = tuned
    out = tmp_path / "full.safetensors"
    words = ["extract", "--model_org", GOLDEN / "sd15", "--model_tuned", folder, "--save_to", out, "--algo", "full"]
    said = run(capsys, *words)
    assert "all 0 (largest: 0" in said
    found = Adapter.load(out)
    assert found.kinds == {"full": len(adapter.modules)}
    assert distance(found, adapter) < 1e-5
    merged = Checkpoint.open(found.merge_into(GOLDEN / "sd15", tmp_path / "again"))
    wanted = Checkpoint.open(folder)
    for module in found.modules:
        torch.testing.assert_close(merged.weight(module), wanted.weight(module), rtol=0, atol=1e-7)
    run(capsys, *words, "--save_precision", "fp16")
    assert 1e-5 < distance(Adapter.load(out), found) < 1e-3


@pytest.mark.parametrize("options", [["--factor", "2"], ["--target_error", "0.5"], []])
def test_kronecker_products(tmp_path, capsys, options):
    """A difference that is one comes back; the error of others is the one that is printed."""
    torch.manual_seed(0)
    pairs = Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors")
    products = {}
    for module, pair in pairs.modules.items():
        out, into, *kernel = pair.delta().shape
        products[module] = Kronecker(torch.randn(2, 2), 0.1 * torch.randn(out // 2, into // 2, *kernel), 1.0)
    adapter = pairs.with_modules(products)
    folder, out = adapter.merge_into(GOLDEN / "sd15", tmp_path / "tuned"), tmp_path / "out.safetensors"
    words = ["--model_org", GOLDEN / "sd15", "--model_tuned", folder, "--save_to", out, "--algo", "lokr"]
    said = run(capsys, "extract", *words, *options)
    found = Adapter.load(out)
    assert set(found.kinds) == {"LoKr"}
    whole = distance(found, adapter)
    assert float(said.partition("all ")[2].split()[0]) == pytest.approx(whole, rel=1e-2, abs=1e-4)
    if options == ["--factor", "2"]:
        assert whole < 1e-4
    if "--target_error" in options:
        assert whole < 0.5


def test_options_of_other_kinds_are_refused(tmp_path, capsys):
    for words, said in (
        (["--algo", "lokr", "--dim", "4"], "--dim cannot be used with --algo lokr"),
        (["--algo", "full", "--target_error", "0.1"], "--target_error cannot be used with --algo full"),
        (["--factor", "4"], "--factor cannot be used with --algo lora"),
        (["--algo", "lokr", "--factor", "4", "--target_error", "0.1"], "give only one"),
        (["--algo", "lokr", "--factor", "0"], "--factor must be -1, or at least 1, got 0"),
    ):
        models = ["--model_org", GOLDEN / "sd15", "--model_tuned", GOLDEN / "sd15"]
        assert said in misused(capsys, "extract", *models, "--save_to", tmp_path / "a.safetensors", *words)


def test_models_that_do_not_fit_together(tmp_path):
    with pytest.raises(AdapterError, match=r"sd15 is SD1.x, but .*sdxl is SDXL"):
        extract(GOLDEN / "sd15", GOLDEN / "sdxl", 4)
    tensors = original("sd1")
    del tensors["model.diffusion_model.middle_block.1.proj_in.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"mid_block.attentions.0.proj_in is in .*sd15, but not in .*a.safetensors"):
        extract(GOLDEN / "sd15", tmp_path / "a.safetensors", 4)
    tensors = original("sd1")
    tensors["model.diffusion_model.middle_block.1.proj_in.weight"] *= float("nan")
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match=r"mid_block.attentions.0.proj_in has NaN"):
        extract(GOLDEN / "sd15", tmp_path / "b.safetensors", 4)


def spectrum(kind, rows, columns):
    """Matrices with known singular values: a decay with noise as of fine-tuning, noise alone, an exact low rank."""
    generator = torch.Generator().manual_seed(rows + columns)
    if kind == "noise":
        return torch.randn(rows, columns, generator=generator)
    values = torch.arange(1, 65) ** -0.8
    left = torch.linalg.qr(torch.randn(rows, 64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, 64, generator=generator)).Q
    matrix = (left * values) @ right.T
    return matrix + torch.randn(rows, columns, generator=generator) * (3e-4 if kind == "decay" else 0)


@pytest.mark.parametrize("shape", [(640, 640), (320, 2560), (1280, 400), (300, 2880)])
@pytest.mark.parametrize("kind", ["decay", "noise", "exact"])
@pytest.mark.parametrize("rank", [4, 32, 64])
def test_the_error_is_within_half_a_percent_of_the_optimum(shape, kind, rank):
    matrix = spectrum(kind, *shape)
    up, down, fit = best_approximation(matrix, fixed(rank), rank)
    assert up.shape == (shape[0], rank)
    assert down.shape == (rank, shape[1])
    exact = matrix.double()
    values = torch.linalg.svdvals(exact)
    lost = float((exact - up.double() @ down.double()).norm())
    size = float(values.norm())
    assert lost <= 1.005 * float(values[rank:].norm()) + 2e-6 * size
    assert fit.error == pytest.approx(lost / size, rel=1e-3, abs=3e-6)
    torch.testing.assert_close(down @ down.T, torch.eye(rank), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(640, 300), (300, 640), (20, 30)])
def test_whole_spectrum_for_a_target_error(shape):
    matrix = spectrum("decay", *shape) if min(shape) > 64 else torch.randn(shape)
    up, down, fit = best_approximation(matrix, by_error(0.2), None)
    values = torch.linalg.svdvals(matrix.double())
    wanted = next(k for k in range(len(values)) if values[k:].norm() <= 0.2 * values.norm())
    assert abs(up.shape[1] - wanted) <= 1
    assert float((matrix - up @ down).norm() / matrix.norm()) == pytest.approx(fit.error, rel=1e-3)
    assert fit.error <= 0.2 + 1e-5


def test_a_spectrum_that_ends_early_gives_no_huge_numbers():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(320, 4, generator=generator) @ torch.randn(4, 768, generator=generator)
    up, down, fit = best_approximation(matrix, fixed(160), 160)
    torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-4)
    assert down.abs().max() < 1.01  # rows of length 1
    assert fit.missing < 1e-8 * fit.total
