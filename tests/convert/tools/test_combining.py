"""merge and svd-merge with --method."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter
from lora_adapters.convert.deltas.combined import Combination
from tests.convert.checkpoints import original
from tests.convert.scripts import SD15, misused, run

A, B = SD15 / "lierla.safetensors", SD15 / "block_dims.safetensors"
PRUNED = ["--models", A, B, "--ratios", "0.5", "0.7", "--density", "0.3"]


@pytest.fixture
def model(tmp_path):
    save_file(original("sd1"), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_into_a_model_exactly(method, model, tmp_path, capsys):
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    words = ["merge", "--sd_model", model, *PRUNED, "--method", method]
    said = run(capsys, *words, "--save_to", out)
    assert "merged 2 into" in said
    combination = Adapter.combine([Adapter.load(A), Adapter.load(B)], [0.5, 0.7], method, 0.3)
    combination.merge_into(model, tmp_path / "wanted.safetensors")
    wanted, merged = load_file(tmp_path / "wanted.safetensors"), load_file(out)
    assert all(torch.equal(merged[key], wanted[key]) for key in wanted)
    if method.startswith("dare"):
        run(capsys, *words, "--seed", "1", "--save_to", again)
        other = load_file(again)
        assert any(not torch.equal(merged[key], other[key]) for key in merged)


def test_into_one(tmp_path, capsys):
    """A pruned sum of the given rank, the best that there is; its error is printed."""
    out, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    said = run(capsys, "merge", *PRUNED, "--method", "ties", "--new_rank", "100", "--save_to", out)
    assert "relative error" in said
    a, b, result = Adapter.load(A), Adapter.load(B), Adapter.load(out)
    for module, one in result.modules.items():
        parts = [(each.modules[module].delta(), w) for each, w in ((a, 0.5), (b, 0.7)) if module in each.modules]
        wanted = Combination("ties", 0.3)(*zip(*parts, strict=True))
        torch.testing.assert_close(one.delta(), wanted, rtol=1e-4, atol=1e-5)
    run(capsys, "svd-merge", *PRUNED, "--method", "ties", "--new_rank", "100", "--save_to", other)
    for module, one in Adapter.load(other).modules.items():
        torch.testing.assert_close(one.delta(), result.modules[module].delta(), rtol=1e-4, atol=1e-5)


def test_options_that_do_not_fit(tmp_path, capsys):
    out = ["--save_to", tmp_path / "never.safetensors"]
    for words, said in (
        ([*PRUNED], "--density goes with a --method"),
        (["--models", A, "--seed", "3"], "--seed goes with a --method"),
        (["--models", A, "--method", "ties"], "needs --density"),
        ([*PRUNED, "--method", "ties"], "give --new_rank"),
        ([*PRUNED, "--method", "ties", "--seed", "3"], "ties draws nothing"),
        ([*PRUNED, "--method", "dare_linear", "--majority_sign_method", "total"], "elects no sign"),
    ):
        assert said in misused(capsys, "merge", *words, *out)
    assert not list(tmp_path.iterdir())
