"""merge and svd-merge with --method."""

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

from lora_adapters.convert import Adapter, LowRank, ModuleName
from lora_adapters.convert.deltas import Full
from lora_adapters.convert.deltas.combined import Combination
from lora_adapters.convert.families.names import bias_of
from lora_adapters.convert.storage.checkpoint import Checkpoint
from tests.convert.checkpoints import original
from tests.convert.scripts import SD15, misused, run
from tests.convert.tools.test_other_kinds import changes, numbers

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
        ([*PRUNED], "--density requires a --method"),
        (["--models", A, "--seed", "3"], "--seed requires a --method"),
        (["--models", A, "--method", "ties"], "needs --density"),
        ([*PRUNED, "--method", "ties"], "give --new_rank"),
        ([*PRUNED, "--method", "ties", "--seed", "3"], "ties is not random"),
        ([*PRUNED, "--method", "dare_linear", "--majority_sign_method", "total"], "does not elect signs"),
    ):
        assert said in misused(capsys, "merge", *words, *out)
    assert not list(tmp_path.iterdir())


DOWN = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
UP = {"sd1": "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_v",
      "sdxl": "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v"}  # fmt: skip
# A weight for each block: those of BASE, IN04, MID and the block of UP (OUT05, OUT01) are the ones of `FACTORS`.
BLOCKS = {
    "sd1": [0.5, *[9] * 2, 0.8, *[9] * 3, 1.3, *[9] * 2, 0.6, *[9] * 6],
    "sdxl": [0.5, 0.8, *[9] * 3, 1.3, 9, 0.6, *[9] * 4],
}
FACTORS = {"text": 0.5, "down": 0.8, "mid_": 1.3, "up_b": 0.6}


def block_weight(module):
    """What the lists of `BLOCKS` say of a module; 1 of those outside of the blocks."""
    start = "text" if module.component.startswith("text") else module.path[:4]
    return FACTORS.get(start, 1.0)


def two_of_all_kinds(checkpoint, up):
    """Two adapters of a checkpoint, of which one has a change of each kind, the other pairs and full differences."""
    one = changes(checkpoint)
    known, second = checkpoint.parameters, {}
    for module in [*one, ModuleName("unet", DOWN), ModuleName("unet", up)]:
        shape = tuple(checkpoint.weight(module, known[module]).shape)
        if len(shape) == 2:
            second[module] = LowRank(numbers(3, shape[1]), numbers(shape[0], 3), 3.0)
        elif module in one and one[module].bias() is not None:
            second[module] = Full(numbers(*shape), numbers(shape[0])) if len(shape) > 1 else one[module].scaled(-0.4)
    return Adapter(one, base := {"ss_base_model_version": checkpoint.base_version}), Adapter(second, base)


@pytest.mark.parametrize("weighted", [False, True], ids=["whole", "block weights"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_all_kinds_as_pefts_arithmetic_puts_their_changes_together(kind, method, weighted, tmp_path, capsys):
    save_file(original(kind), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    known = checkpoint.parameters
    adapters = two_of_all_kinds(checkpoint, UP[kind])
    files = [one.save(tmp_path / f"{number}.safetensors") for number, one in enumerate(adapters)]
    words = [
        "merge",
        "--sd_model",
        checkpoint.path,
        "--models",
        *files,
        "--ratios",
        0.9,
        0.6,
        "--save_to",
        tmp_path / "out.safetensors",
    ]
    words += [] if method == "linear" else ["--method", method, "--density", 0.4]
    listed = ",".join(map(str, BLOCKS[kind]))
    run(capsys, *words, *(["--lbws", f"[{listed}]", f"[{listed}]"] if weighted else []))
    merged = Checkpoint.open(tmp_path / "out.safetensors")
    assert len(adapters[0].kinds) > 9

    def together(parts, module):
        """PEFT's result; its random numbers are those of torch's own generator."""
        tensors, ratios = [tensor for tensor, _ in parts], torch.tensor([ratio for _, ratio in parts])
        if method == "linear":
            return merge_utils.task_arithmetic(tensors, ratios)
        torch.manual_seed(Combination(method, 0.4).of(str(module)).seed)
        return getattr(merge_utils, method)(tensors, ratios, 0.4)

    for module in dict.fromkeys([*adapters[0].modules, *adapters[1].modules]):
        factor = block_weight(module) if weighted else 1.0
        weight, bias, parts, of_bias = checkpoint.weight(module, known[module]).float(), bias_of(module), [], []
        for adapter, ratio in zip(adapters, (0.9, 0.6), strict=True):
            if (change := adapter.modules.get(module)) is None:
                continue
            # A sum is of the changes at their ratios; else these are applied after the pruning.
            change, ratio = (
                (change.scaled(factor * ratio), 1.0) if method == "linear" else (change.scaled(factor), ratio)
            )
            if change.changes_weight:
                parts.append((change.delta(weight), ratio))
            if change.bias() is not None:
                of_bias.append((change.bias(), ratio))
        found = merged.weight(module, merged.parameters[module])
        wanted = weight + together(parts, module) if parts else weight
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=str(module))
        if of_bias:
            wanted = checkpoint.weight(bias, known[bias]).float() + together(of_bias, module)
            torch.testing.assert_close(merged.weight(bias, merged.parameters[bias]), wanted, rtol=1e-5, atol=1e-6)
