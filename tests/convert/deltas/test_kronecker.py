"""LoKr against LyCORIS' module and dense arithmetic."""

import pytest
import torch

from lora_adapters.convert import AdapterError
from lora_adapters.convert.deltas import Kronecker, read_module

from .lycoris_modules import LAYERS, changed, check, check_written, make, written

OPTIONS = {
    "w2 factored": {"factor": 2},
    "both factored": {"factor": 4, "decompose_both": True, "lora_dim": 1},
    "both full": {"full_matrix": True},
    "square factor": {"factor": -1},
    "unbalanced": {"factor": 2, "unbalanced_factorization": True},
    "tucker": {"factor": 2, "use_tucker": True},
    "scalar, rs": {"factor": 2, "use_scalar": True, "rs_lora": True},
}


@pytest.mark.parametrize("multiplier", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_lokr(layer, options, multiplier):
    change = check("LokrModule", LAYERS[layer](), multiplier, **{"lora_dim": 2, "alpha": 3, **OPTIONS[options]})
    assert (change.kind, change.needs_base) == ("LoKr", False)


def test_rank_stabilised_without_a_rank():
    layer = LAYERS["linear"]()
    module = make("LokrModule", layer, lora_dim=9, alpha=3, full_matrix=True, rs_lora=True)
    tensors, inputs = written(module), torch.randn(5, 24)
    change = read_module(tensors, rs_lora=True)
    torch.testing.assert_close(change.delta(), 3 * read_module(tensors).delta())
    with torch.no_grad():
        torch.testing.assert_close(changed(layer, change, inputs), module(inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read_module(change.tensors(), rs_lora=True).delta(), change.delta())


@pytest.mark.parametrize("options", ["w2 factored", "both full", "square factor"])
@pytest.mark.parametrize("layer", ["linear", "conv3x3"])
def test_lycoris_reads_what_is_written(layer, options):
    made = LAYERS[layer]()
    change = check("LokrModule", made, 1.0, **{"lora_dim": 2, "alpha": 3, **OPTIONS[options]})
    check_written(change.scaled(0.7), made)


def test_alpha_counts_only_where_there_is_a_rank():
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5)
    full = Kronecker(w1, w2, alpha=7.0)
    assert full.rank is None
    torch.testing.assert_close(full.delta(), torch.kron(w1, w2))
    torch.testing.assert_close(full.scaled(0.5).delta(), 0.5 * torch.kron(w1, w2))
    half = full.scaled(0.5).tensors()
    assert half["alpha"] == 7
    torch.testing.assert_close(read_module(half).delta(), 0.5 * torch.kron(w1, w2))
    factored = Kronecker(w1, None, 7.0, w2_a=torch.randn(4, 2), w2_b=torch.randn(2, 5))
    torch.testing.assert_close(factored.delta(), 3.5 * torch.kron(w1, factored.w2_a @ factored.w2_b))


def test_a_kernel_may_be_flattened_in_w2_b():
    w1, w2_a, kernel = torch.randn(2, 3), torch.randn(4, 2), torch.randn(2, 5, 3, 3)
    flat = Kronecker(w1, None, 2.0, w2_a=w2_a, w2_b=kernel.flatten(1))
    whole = Kronecker(w1, None, 2.0, w2_a=w2_a, w2_b=kernel)
    assert (flat.shape, whole.shape) == ((8, 135), (8, 15, 3, 3))
    assert flat.fits((8, 15, 3, 3))
    assert flat.fits((8, 135))
    assert not flat.fits((8, 5, 3, 9))  # as many numbers, but three columns of w1 do not divide five channels
    weight = torch.randn(8, 15, 3, 3)
    torch.testing.assert_close(flat.delta(weight), whole.delta(weight))


def test_a_weight_of_0_is_read_as_no_change():
    full = Kronecker(torch.ones(2, 2), torch.ones(2, 2), 1.0)
    factored = Kronecker(None, torch.ones(2, 2), 1.0, w1_a=torch.ones(2, 1), w1_b=torch.ones(1, 2))
    for one in (full, factored):
        assert one.delta().all()
        assert not read_module(one.scaled(0).tensors()).delta().any()


A, B = torch.ones(4, 2), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"w1": A, "w2": None}, "either lokr_w2 or both lokr_w2_a and lokr_w2_b"),
        ({"w1": A, "w2": A, "w2_a": A, "w2_b": B}, "either lokr_w2 or both"),
        ({"w1": None, "w2": A, "w1_a": A}, "either lokr_w1 or both lokr_w1_a and lokr_w1_b"),
        ({"w1": A, "w2": A, "t2": torch.ones(2, 2, 3, 3)}, "lokr_t2 belongs to lokr_w2_a"),
        ({"w1": torch.ones(4), "w2": A}, r"lokr_w1 has the shape \[4\]"),
        ({"w1": A, "w2": None, "w2_a": torch.ones(4, 3), "w2_b": B}, r"lokr_w2_a has the shape \[4, 3\]"),
        ({"w1": A, "w2": None, "w2_a": B, "w2_b": B, "t2": torch.ones(3, 3, 3, 3)}, "lokr_t2 .* the rank is 2"),
        (
            {"w1": None, "w2": None, "w1_a": torch.ones(4, 3), "w1_b": torch.ones(3, 4), "w2_a": A, "w2_b": B},
            "ranks differ: lokr_w1_b has 3, lokr_w2_b has 2",
        ),
    ],
)
def test_what_does_not_fit(parts, said):
    with pytest.raises(AdapterError, match=said):
        Kronecker(alpha=1.0, **parts)
