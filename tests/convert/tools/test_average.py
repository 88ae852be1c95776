"""The average of several adapters, and of the DyLoRAs of one training at each rank."""

import pytest
import torch
from safetensors.torch import load_file

from lora_adapters.convert import Adapter, AdapterError, DyLora, LowRank, ModuleName
from lora_adapters.convert.deltas import Full, Hadamard, Norm
from lora_adapters.convert.deltas.low_rank import add_up
from lora_adapters.convert.tools.average import average
from tests.convert.scripts import SD15, fails, misused, run

NAME = ModuleName("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = ModuleName("unet", "mid_block.resnets.0.conv1")


def saves(count=3, rank=4, near=0.05, **metadata):
    """Adapters that differ a little, as saves of one training do."""
    torch.manual_seed(0)
    down, up, conv, out = torch.randn(rank, 14), torch.randn(12, rank), torch.randn(rank, 3, 3, 3), torch.randn(9, rank)
    made = {}
    for number in range(count):
        one = LowRank(down + near * torch.randn(down.shape), up + near * torch.randn(up.shape), 2.0)
        other = LowRank(
            conv + near * torch.randn(conv.shape), (out + near * torch.randn(out.shape))[..., None, None], 1.0
        )
        made[f"{number}.safetensors"] = Adapter({NAME: one, CONV: other}, metadata)
    return made


def dense_mean(adapters, module, rank=None):
    ones = [one if rank is None else one.truncate(rank) for one in adapters.values()]
    return sum(one.modules[module].delta() for one in ones) / len(adapters)


def relative(one, other):
    return float((one - other).norm() / other.norm())


def test_pairs_are_averaged_as_changes():
    adapters = saves()
    result, fits = average(adapters)
    for module in (NAME, CONV):
        wanted = dense_mean(adapters, module)
        u, values, vh = torch.linalg.svd(wanted.flatten(1))
        best = ((u[:, :4] * values[:4]) @ vh[:4]).reshape(wanted.shape)
        torch.testing.assert_close(result.modules[module].delta(), best, rtol=1e-4, atol=1e-4)
        assert fits[module].error == pytest.approx(relative(best, wanted), rel=1e-3)
    assert (result.modules[NAME].rank, result.modules[NAME].alpha) == (4, pytest.approx(2.0))


def test_the_factorisation_does_not_matter():
    """One whose signs are turned is the same adapter; the mean of its factors and the other's would be nothing."""
    (one, *_) = saves(1).values()
    turned = one.map(lambda pair: LowRank(-pair.down, -pair.up, pair.alpha))
    result, fits = average({"a": one, "b": turned})
    for module in (NAME, CONV):
        torch.testing.assert_close(result.modules[module].delta(), one.modules[module].delta(), rtol=1e-4, atol=1e-5)
        assert fits[module].error < 1e-5


def test_a_module_that_one_lacks_is_not_changed_by_it():
    (one, *_) = saves(1).values()
    result, _ = average({"a": one, "b": one.with_modules({NAME: one.modules[NAME]})})
    torch.testing.assert_close(result.modules[CONV].delta(), one.modules[CONV].delta() / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", ["sqrt", "constant", "rank"])
@pytest.mark.parametrize("unit", [1, 2, 3])
def test_a_dylora_at_every_rank(unit, scaling):
    adapters = {name: one.as_dylora(DyLora(unit, scaling)) for name, one in saves(near=0.02).items()}
    result, fits = average(adapters)
    assert (result.dylora.unit, result.dylora.rank_scaling) == (unit, scaling)
    for module in (NAME, CONV):
        for rank in [*range(unit, 4, unit), 4]:
            wanted = dense_mean(adapters, module, rank)
            assert relative(result.truncate(rank).modules[module].delta(), wanted) < 0.03
        assert fits[module].error == pytest.approx(
            relative(result.modules[module].delta(), dense_mean(adapters, module)), rel=1e-2
        )
    plain, _ = average(saves(near=0.02))  # the best of the whole rank has its components in another order
    assert relative(plain.as_dylora(DyLora(unit, scaling)).truncate(unit).modules[NAME].delta(),
                    dense_mean(adapters, NAME, unit)) > 0.1  # fmt: skip


def test_equal_dyloras_have_themselves_as_average():
    (one, *_) = saves(1).values()
    dylora = one.as_dylora(DyLora(2))
    turned = dylora.map(lambda pair: pair.reordered(torch.tensor([1, 0, 3, 2])))  # within units
    result, _ = average({"a": dylora, "b": turned})
    for rank in (2, 4):
        ours, theirs = (each.truncate(rank).modules[CONV].delta() for each in (result, dylora))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    nothing, fits = average({"a": dylora.scale(0), "b": dylora.scale(0)})
    assert not nothing.modules[NAME].delta().any()
    assert fits[NAME].error == 0


def test_full_changes_and_norms_exactly():
    torch.manual_seed(0)
    name = ModuleName("unet", "mid_block.attentions.0.norm")
    ones = [{NAME: Full(torch.randn(3, 4).half(), torch.randn(3)), name: Norm(torch.randn(5), None)} for _ in range(2)]
    result, _ = average({str(number): Adapter(modules) for number, modules in enumerate(ones)})
    for module in (NAME, name):
        wanted = (ones[0][module].delta() + ones[1][module].delta()) / 2
        torch.testing.assert_close(result.modules[module].delta(), wanted)
    torch.testing.assert_close(result.modules[NAME].bias(), (ones[0][NAME].diff_b + ones[1][NAME].diff_b) / 2)


def test_what_has_no_average():
    loha = Hadamard(*(torch.randn(s) for s in ((12, 2), (2, 14), (12, 2), (2, 14))), alpha=1.0)
    one = Adapter({NAME: loha})
    with pytest.raises(AdapterError, match="cannot average a LoHa, or changes of different kinds"):
        average({"a": one, "b": one})
    a, b = list(saves(2).values())
    with pytest.raises(AdapterError, match="a is not a DyLoRA, but b is a DyLoRA of unit 2"):
        average({"a": a, "b": b.as_dylora(DyLora(2))})
    wide = b.map(lambda pair: add_up([pair, pair]))
    with pytest.raises(AdapterError, match=r"different ranks \(4, 8\)"):
        average({"a": a.as_dylora(DyLora(2)), "b": wide.as_dylora(DyLora(2))})


def test_the_program(tmp_path, capsys):
    a = Adapter.load(SD15 / "lierla.safetensors")
    files = [a.save(tmp_path / "a.safetensors"), a.scale(3).save(tmp_path / "b.safetensors")]
    said = run(capsys, "average", *files, "--output", tmp_path / "out.safetensors", "--save_precision", "fp16")
    assert "relative error" in said
    result = Adapter.load(tmp_path / "out.safetensors")
    for module, one in result.modules.items():
        torch.testing.assert_close(one.delta(), 2 * a.modules[module].delta(), rtol=1e-2, atol=1e-4)
        assert one.rank == a.modules[module].rank
    assert result.metadata["modelspec.merged_from"] == "a, b"
    assert all(tensor.dtype == torch.float16 for key, tensor in load_file(tmp_path / "out.safetensors").items()
               if not key.endswith("alpha"))  # fmt: skip
    assert "two or more" in misused(capsys, "average", files[0], "--output", tmp_path / "never.safetensors")
    assert "twice" in misused(capsys, "average", files[0], files[0], "--output", tmp_path / "never.safetensors")
    xl = SD15.parent / "sdxl" / "lierla_xl.safetensors"
    assert "lierla_xl" in fails(capsys, "average", files[0], xl, "--output", tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()
