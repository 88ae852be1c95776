"""TIES, DARE and magnitude pruning, against PEFT's merge_utils."""

import peft
import pytest
import torch
from packaging.version import Version
from peft.utils import merge_utils

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.deltas import DoRA, Full, WithBias
from lora_adapters.convert.deltas.combined import METHODS, Combination, combined, prune_small
from lora_adapters.convert.deltas.low_rank import add_up

WEIGHTS = [0.7, -0.4, 1.1]
NAME = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = ModuleName("unet", "mid_block.resnets.0.conv1")
# These versions compute the quotient by the density and drop it.
DROPS_THE_DENSITY = Version(peft.__version__) < Version("0.19")


def changes(*shape):
    torch.manual_seed(1)
    return [torch.randn(shape) for _ in WEIGHTS]


def peft_s(method, tensors, density, majority="total"):
    function = getattr(merge_utils, method)
    options = {"majority_sign_method": majority} if method.endswith("ties") else {}
    total = function(tensors, torch.tensor(WEIGHTS), density, **options)
    return total / density if method.startswith("dare") and DROPS_THE_DENSITY else total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.77, 0.001])
def test_as_peft(method, majority, density):
    tensors = changes(6, 5, 3, 3)
    torch.manual_seed(5)  # PEFT draws from the global generator
    wanted = peft_s(method, [one.clone() for one in tensors], density, majority)
    ours = Combination(method, density, majority, seed=5)([one.clone() for one in tensors], WEIGHTS)
    torch.testing.assert_close(ours, wanted)
    assert bool(ours.any()) == bool(wanted.any())


def test_the_whole_density_prunes_nothing():
    tensors = changes(4, 4)
    for method in ("magnitude_prune", "dare_linear"):
        total = Combination(method, 1.0)([one.clone() for one in tensors], WEIGHTS)
        torch.testing.assert_close(total, sum(w * one for w, one in zip(WEIGHTS, tensors, strict=True)))


def test_ties_by_hand():
    ones = [torch.tensor([4.0, 3.0, -1.0, 0.5]), torch.tensor([-5.0, 2.0, -3.0, 0.25])]
    # kept: 4, 3 and -5, -3; signs of the sums: -, +, -, + (of nothing)
    assert Combination("ties", 0.5)(ones, [1.0, 2.0]).tolist() == [-10.0, 3.0, -6.0, 0.0]


def test_numbers_of_equal_size_are_kept_together():
    assert prune_small(torch.tensor([1.0, -1.0, 0.5, 2.0]), 0.5).tolist() == [1.0, -1.0, 0.0, 2.0]
    assert prune_small(torch.tensor([3.0, 1.0]), 0.4).tolist() == [0.0, 0.0]


def adapter(seed, rank, alpha=2.0):
    torch.manual_seed(seed)
    pair = LowRank(torch.randn(rank, 12), torch.randn(10, rank), alpha)
    conv = LowRank(torch.randn(rank, 3, 3, 3), torch.randn(4, rank, 1, 1), alpha)
    return Adapter({NAME: pair, CONV: conv})


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_any_ranks(method):
    """Pruned is the change in full, so that the factorisation does not matter."""
    a, b = adapter(0, 2), adapter(1, 4)
    again = a.map(lambda pair: add_up([pair.scaled(0.25), pair.scaled(0.75)]))  # the same change at another rank
    one, other = (Adapter.combine([first, b], [0.5, 1.0], method, 0.4, seed=3) for first in (a, again))
    for module in (NAME, CONV):
        wanted = Combination(method, 0.4, seed=Combination(method, 0.4, seed=3).of(str(module)).seed)(
            [a.modules[module].delta(), b.modules[module].delta()], [0.5, 1.0]
        )
        torch.testing.assert_close(one.modules[module].delta(), wanted)
        torch.testing.assert_close(other.modules[module].delta(), wanted)
    torch.testing.assert_close(one.svd(10).modules[NAME].delta(), one.modules[NAME].delta())
    torch.testing.assert_close(one.scale(2.0).modules[CONV].delta(), 2 * one.modules[CONV].delta())


def test_seeds():
    a, b = adapter(0, 2), adapter(1, 2)

    def draw(seed, first=a):
        return Adapter.combine([first, b], [1, 1], "dare_linear", 0.5, seed=seed).modules[NAME].delta()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    alone = a.with_modules({NAME: a.modules[NAME]})
    assert torch.equal(draw(1), draw(1, alone))  # other modules change nothing
    share = float((draw(1) != 0).float().mean())
    assert 0.5 < share < 0.95  # 1 - 0.5², where two changes are kept at random


def test_biases_and_changes_that_depend_on_the_weight():
    torch.manual_seed(0)
    pair, weight = adapter(0, 2).modules[NAME], torch.randn(10, 12)
    bias = torch.tensor([4.0, -1.0] * 5)
    dora = DoRA(pair, torch.rand(10, 1) + 0.5)
    how = Combination("ties", 0.5)
    both = combined("x", [(WithBias(pair, bias), 1.0), (dora, 0.5), (Full(None, -bias), 1.0)], how)
    assert both.needs_base
    wanted = how([pair.delta(), dora.delta(weight)], [1.0, 0.5])
    torch.testing.assert_close(both.delta(weight), wanted)
    assert both.bias().tolist() == [4.0, 0.0] * 5  # -4 and 4 keep half; their sum is 0, which counts as positive


def test_what_makes_no_sense_is_refused():
    for wrong in ({"method": "tie"}, {"density": 0.0}, {"density": 1.5}, {"majority": "most"}):
        with pytest.raises(AdapterError):
            Combination(**{"method": "ties", "density": 0.5, **wrong})
    a = adapter(0, 2)
    with pytest.raises(AdapterError, match="cannot be written"):
        Adapter.combine([a, a], [1, 1], "ties", 0.5).save("never.safetensors")
