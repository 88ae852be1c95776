"""Best approximations from the factors, against dense SVDs in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_adapters.convert import Adapter, AdapterError, LowRank
from lora_adapters.convert.deltas.rank_choice import by_error, dynamic
from lora_adapters.convert.deltas.reduction import reduce_modules
from lora_adapters.convert.deltas.svd import reduced, rules, total
from lora_adapters.convert.families.sd import SD
from lora_adapters.convert.tools.block_weights import parse, weighted
from lora_adapters.convert.tools.merge import weighted_sum
from tests.convert.checkpoints import GOLDEN


@st.composite
def low_ranks(draw):
    """Random pairs, also with more components than the weight has rows, and with dependent ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out, into, rank = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 16))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
    down = torch.randn(rank, into, *kernel, generator=generator)
    if draw(st.booleans()):
        down[rank // 2 :] = down[: rank - rank // 2].clone()
    return LowRank(down, up, draw(st.sampled_from([0.5, 1.0, 3.0, -1.0])))


@settings(max_examples=60, deadline=None)
@given(low_ranks(), st.integers(1, 10))
def test_the_optimum_of_its_rank(one, rank):
    less, fit = reduced(one, rules(rank, rank).of(one))
    dense = one.delta(dtype=torch.float64).flatten(1)
    values = torch.linalg.svdvals(dense)
    assert less.rank <= rank
    assert less.scale == 1
    assert less.delta().shape == one.delta().shape
    missing = float((dense - less.delta(dtype=torch.float64).flatten(1)).norm())
    size = float(values.norm())
    assert missing == pytest.approx(float(values[rank:].norm()), abs=3e-6 * size)
    assert fit.error == pytest.approx(missing / size, abs=3e-6)


@settings(max_examples=30, deadline=None)
@given(low_ranks(), st.sampled_from([0.0, 0.05, 0.3, 0.9]))
def test_target_error_chooses_the_smallest_rank(one, target):
    less, fit = reduced(one, by_error(target))
    assert fit.error <= target + 1e-6
    values = torch.linalg.svdvals(one.delta(dtype=torch.float64).flatten(1))
    if less.rank > 1 and target > 0:
        assert float(values[less.rank - 1 :].norm() / values.norm()) > target


def golden_sum():
    a, b = (Adapter.load(GOLDEN / "sd15" / f"{name}.safetensors") for name in ("c3lier", "block_dims"))
    return weighted_sum({"a": a, "b": b}, [0.6, 0.4])


def test_kohyas_clamped_merge_is_reproduced_and_beaten():
    whole, golden = golden_sum(), Adapter.load(GOLDEN / "sd15" / "kohya_svd_merge.safetensors")
    assert set(whole.modules) == set(golden.modules)
    clamped, kohyas = reduce_modules(whole.modules, rules(8, 4), clamp_quantile=0.99)
    _, ours = reduce_modules(whole.modules, rules(8, 4))
    far = []
    for module, wanted in golden.modules.items():
        assert clamped[module].rank == wanted.rank
        exact = wanted.delta(dtype=torch.float64).flatten(1)
        distance = float((clamped[module].delta(dtype=torch.float64).flatten(1) - exact).norm() / exact.norm())
        far += [distance] if distance > 1e-3 else []
        assert ours[module].error <= kohyas[module].error + 1e-6
    assert len(far) <= 2  # nearly equal singular values, whose vectors turn into each other
    assert max(far, default=0) < 0.02
    assert total(ours.values()).error < 0.7 * total(kohyas.values()).error  # 0.124 and 0.186


def test_clamped_results_tell_their_own_error():
    one = next(iter(golden_sum().modules.values()))
    less, fit = reduced(one, rules(8).of(one), clamp_quantile=0.9)
    exact = one.delta(dtype=torch.float64)
    wanted = float((less.delta(dtype=torch.float64) - exact).norm() / exact.norm())
    assert fit.error == pytest.approx(wanted, rel=1e-4)


def test_full_rank_is_lossless_and_kept_scales_stay():
    whole = golden_sum()
    for keep in (False, True):
        modules, fits = reduce_modules(whole.modules, rules(100), keep_scale=keep)
        assert total(fits.values()).error < 1e-6
        for module, one in whole.modules.items():
            torch.testing.assert_close(modules[module].delta(), one.delta(), rtol=1e-4, atol=1e-6)
            assert modules[module].scale == pytest.approx(one.scale if keep else 1)


def test_adapter_svd():
    adapter = Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors")
    less = adapter.svd(2, 1)
    assert {one.rank for module, one in less.modules.items() if one.kernel == (3, 3)} == {1}
    assert less.rank == 2
    assert less.full_metadata()["ss_network_args"] == '{"conv_dim": "1", "conv_alpha": "1.0"}'
    assert less.full_metadata()["ss_network_dim"] == "2"
    assert max(one.rank for one in adapter.svd(None, target_error=0.5).modules.values()) < 8


@pytest.mark.parametrize(
    ("method", "parameter", "wanted"),
    [
        ("sv_ratio", 4.0, 3),  # 8, 4 and 3 are above 8 / 4
        ("sv_cumulative", 0.5, 2),  # 8 of 18 is below one half, 12 is not
        ("sv_fro", 0.9, 2),  # 64 of 94 is below 0.81, 80 is not
        ("sv_fro", 0.8, 1),  # 64 of 94 is above 0.64
        ("sv_ratio", 1000.0, 5),  # never more than there are
        ("sv_fro", 1.0, 5),
    ],
)
def test_dynamic_ranks(method, parameter, wanted):
    values = torch.tensor([8.0, 4.0, 3.0, 2.0, 1.0])
    assert dynamic(method, parameter, 32)(values) == wanted
    assert dynamic(method, parameter, 2)(values) == min(wanted, 2)
    assert dynamic(method, parameter, 32)(torch.zeros(5)) == 1


@pytest.mark.parametrize(
    ("method", "parameter", "wanted"), [("sv_ratio", 3, 2), ("sv_cumulative", 0.5, 1), ("sv_fro", 0.9, 2)]
)
def test_dynamic_ranks_are_those_of_kohyas_since_0_11(method, parameter, wanted):
    assert dynamic(method, parameter, 4)(torch.tensor([8.0, 4.0, 2.0, 1.0])) == wanted


def test_what_makes_no_sense_is_refused():
    one = LowRank(torch.ones(2, 3), torch.ones(3, 2), 1.0)
    for wrong in (lambda: rules(0), lambda: rules(4, target_error=1.5), lambda: dynamic("sv_fro", 2.0, 4)):
        with pytest.raises(AdapterError):
            wrong()
    with pytest.raises(AdapterError, match="NaN"):
        reduced(LowRank(torch.full((2, 3), float("inf")), torch.ones(3, 2), 1.0), rules(1).linear)
    with pytest.raises(AdapterError, match="quantile"):
        reduced(one, rules(1).linear, clamp_quantile=2.0)
    nothing, fit = reduced(LowRank(torch.zeros(2, 3), torch.ones(3, 2), 1.0), rules(1).linear)
    assert (nothing.rank, fit.error) == (1, 0)
    assert not nothing.delta().any()


@pytest.mark.parametrize(
    ("golden", "count", "changed"),
    [("sd15/c3lier", 26, range(25)), ("sd15/c3lier", 17, (1, 2, 4, 5, 7, 8, 12, *range(16, 25)))],
)
def test_block_weights(golden, count, changed):
    adapter = Adapter.load(GOLDEN / f"{golden}.safetensors")
    weights = [0.5, *(10.0 + block for block in changed)]
    assert len(weights) == count
    for module, one in weighted(adapter, weights).modules.items():
        block = SD.blocks.index(module.path) if module.component == "unet" else None
        wanted = 0.5 if block is None else 10.0 + block if block in changed else 1.0
        assert one.alpha / adapter.modules[module].alpha == pytest.approx(wanted)


def test_block_weights_of_sdxl():
    adapter = Adapter.load(GOLDEN / "sdxl" / "c3lier_xl.safetensors")
    for count, mid, first_out in ((20, 10, 11), (12, 5, 6)):
        found = weighted(adapter, [float(n) for n in range(1, count + 1)])
        for module, one in found.modules.items():
            factor = one.alpha / adapter.modules[module].alpha
            if module.component != "unet":
                assert factor == 1
            elif module.path.startswith("mid_block"):
                assert factor == mid + 1
            elif module.path.startswith("up_blocks.0.attentions.0"):
                assert factor == first_out + 1
    with pytest.raises(AdapterError, match="26 block weights are for sd"):
        weighted(adapter, [1.0] * 26)
    assert [*parse("1,0.5," + ",".join("0" * 10)).values()] == [1, 0.5, *[0] * 10]
    with pytest.raises(AdapterError, match="3 block weights"):
        parse("[1, 2, 3]")
    with pytest.raises(AdapterError, match="list of numbers"):
        parse("[1, x]")
