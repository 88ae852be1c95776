"""Several adapters stacked are the sum that PEFT computes, whatever is done to them in between."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from diffusers.utils import peft_utils
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch._dynamo.testing import CompileCounter

from lora_adapters import Adapter, AdapterError, DyLoraConfig, set_rank, set_step, stacking
from lora_adapters.injection import take_out

from .conftest import GOLDEN, expected
from .golden_outputs import outputs

BASES = {
    "linear": (lambda: nn.Linear(12, 20), (2, 5, 12)),
    "rows": (lambda: nn.Linear(12, 20, bias=False), (4, 12)),
    "conv1x1": (lambda: nn.Conv2d(12, 20, 1), (2, 12, 6, 6)),
    "conv3x3": (lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1), (2, 12, 7, 7)),
}


def model(base: str = "linear", count: int = 3, **options) -> tuple[nn.Module, torch.Tensor]:
    """A layer with plain adapters a, b, ... of several ranks and weights, all active, and an input."""
    torch.manual_seed(0)
    make, shape = BASES[base]
    one = nn.Sequential(make())
    for number, name in enumerate("abcdefgh"[:count]):
        add(one, name, LoraConfig(r=number % 3 + 1, lora_alpha=2, target_modules=["0"], **options))
    activate(one, "abcdefgh"[:count])
    return one.eval().requires_grad_(False), torch.randn(shape)


def add(one: nn.Module, name: str, config: LoraConfig) -> None:
    inject_adapter_in_model(config, one, adapter_name=name)
    nn.init.normal_(one[0].lora_B[name].weight, std=0.3)
    one.requires_grad_(False)


def activate(one: nn.Module, names: str, *weights: float) -> None:
    weights = weights or tuple(0.5 + number / 4 for number in range(len(names)))
    peft_utils.set_weights_and_activate_adapters(one, list(names), list(weights))
    one.requires_grad_(False)


def summed(one: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What PEFT computes."""
    return type(one[0]).forward.stock(one[0], x)


def is_stacked(one: nn.Module, x: torch.Tensor) -> bool:
    layer = one[0]
    with torch.no_grad():
        return stacking._stack(layer, [name for name in layer.active_adapters if name in layer.lora_A], x) is not None


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_stacked_is_summed(base, count) -> None:
    one, x = model(base, count)
    assert is_stacked(one, x)
    torch.testing.assert_close(one(x), summed(one, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
def test_half_precision_is_as_near_as_pefts(base, dtype) -> None:
    one, x = model(base, 8)
    one, x = one.to(dtype), x.to(dtype)
    exact = summed(copy.deepcopy(one).double(), x.double())
    ours, theirs = ((value.double() - exact).norm() for value in (one(x), summed(one, x)))
    assert one(x).dtype == dtype
    assert ours <= theirs * 1.02


def beside(one: nn.Module, config: LoraConfig) -> None:
    """Another adapter beside the first."""
    add(one, "d", config)
    one[0].set_adapter(["a", "d"])


CHANGES = {
    "weights": lambda one: activate(one, "abc", -0.3, 2.0, 0.0),
    "fewer": lambda one: activate(one, "ca"),
    "one": lambda one: activate(one, "b"),
    "none": lambda one: activate(one, ""),
    "a layer without": lambda one: peft_utils.set_weights_and_activate_adapters(one, ["a", "z", "b"], [1, 1, 1]),
    "disabled": lambda one: one[0].enable_adapters(False),
    "enabled again": lambda one: (one[0].enable_adapters(False), one[0].enable_adapters(True)),
    "another": lambda one: beside(one, LoraConfig(r=4, target_modules=["0"])),
    "deleted": lambda one: one[0].delete_adapter("b"),
    "taken out": lambda one: take_out(one, "c"),
    "other numbers": lambda one: [nn.init.normal_(one[0].lora_A[name].weight) for name in "abc"],
    "numbers set as data": lambda one: one[0].lora_B["a"].weight.data.normal_(),
    "another rank": lambda one: (
        setattr(one[0].lora_A["a"], "weight", nn.Parameter(torch.randn(5, 12), False)),
        setattr(one[0].lora_B["a"], "weight", nn.Parameter(torch.randn(20, 5), False)),
    ),
    "fused": lambda one: one[0].merge(),
    "scaled": lambda one: peft_utils.scale_lora_layers(one, 0.3),
    "prepared": lambda one: prepare_model_for_compiled_hotswap(one, target_rank=8),
    "double": lambda one: one.double(),
    "dropout": lambda one: (
        add(one, "d", LoraConfig(lora_dropout=0.5, target_modules=["0"])) or one[0].set_adapter(["a", "d"])
    ),
    "rslora": lambda one: (
        add(one, "d", LoraConfig(use_rslora=True, target_modules=["0"])) or one[0].set_adapter(["a", "d"])
    ),
    "dora": lambda one: (
        add(one, "d", LoraConfig(use_dora=True, target_modules=["0"])) or one[0].set_adapter(["a", "d"])
    ),
    "biases": lambda one: (
        add(one, "d", LoraConfig(lora_bias=True, target_modules=["0"])) or one[0].set_adapter(["a", "d"])
    ),
    "training": lambda one: one.train().requires_grad_(True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_call(change) -> None:
    one, x = model()
    one(x)
    CHANGES[change](one)
    one[0].lora_dropout.eval()
    x = x.to(next(one.parameters()).dtype)
    torch.testing.assert_close(one(x), summed(one, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_computes_the_same(how) -> None:
    one, x = model()
    before = one(x)
    other = copy.deepcopy(one) if how == "copied" else pickle.loads(pickle.dumps(one))
    assert torch.equal(other(x), before)


def test_only_pairs_are_stacked() -> None:
    for change, stacks in (("dora", False), ("biases", False), ("dropout", False), ("rslora", True)):
        one, x = model()
        CHANGES[change](one)
        assert is_stacked(one, x) == stacks, change
    one, x = model()
    one[0].lora_A["b"].register_forward_hook(lambda *_: None)  # as offloading has it
    assert not is_stacked(one, x)


def test_gradients_are_pefts() -> None:
    one, x = model()
    one.requires_grad_(True)
    one(x).square().sum().backward()
    ours = {name: parameter.grad for name, parameter in one.named_parameters()}
    one.zero_grad()
    summed(one, x).square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in one.named_parameters()}
    assert all(torch.equal(theirs[name], grad) for name, grad in ours.items())


def test_an_input_has_its_gradient_through_frozen_adapters() -> None:
    one, x = model()
    grads = []
    for call in (one, lambda x: summed(one, x)):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


def _train_head(rank: int, folder: Path) -> None:
    """In one of two processes: a step of a layer behind the adapters, with half of the batch."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    one, x = model()
    assert is_stacked(one, x)
    parallel = nn.parallel.DistributedDataParallel(one.append(nn.Linear(20, 1)))
    result = parallel(x[rank : rank + 1])
    result.square().mean().backward()
    torch.save((result.detach(), one[1].weight.grad), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_and_average_what_peft_does(tmp_path) -> None:
    torch.multiprocessing.spawn(_train_head, (tmp_path,), nprocs=2)
    results, grads = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True)
    one, x = model()
    one.append(nn.Linear(20, 1))  # the numbers after those that the model has drawn, as in the processes
    wanted = one[1](summed(one, x))
    torch.testing.assert_close(torch.cat(results), wanted, rtol=1e-5, atol=1e-6)
    wanted.square().mean().backward()
    for grad in grads:
        torch.testing.assert_close(grad, one[1].weight.grad, rtol=1e-5, atol=1e-6)


def test_a_mixed_batch_is_pefts() -> None:
    one, x = model(base="rows")
    names = ["a", "c", "__base__", "b"]
    torch.testing.assert_close(
        one[0](x, adapter_names=names), type(one[0]).forward.stock(one[0], x, adapter_names=names)
    )


def test_under_autocast_it_is_pefts_dtype() -> None:
    one, x = model()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = one(x), summed(one, x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


def test_the_dial_of_a_dylora_turns_beside_other_adapters() -> None:
    one, x = model()
    add(one, "dial", DyLoraConfig(r=8, lora_alpha=4, unit=2, target_modules=["0"]))
    one[0].set_adapter(["a", "dial", "b"])
    one[0].set_scale("dial", 0.7)
    one.eval().requires_grad_(False)
    for rank in (8, 2, 4):
        set_rank(one, rank)
        assert is_stacked(one, x)
        torch.testing.assert_close(one(x), summed(one, x), rtol=1e-5, atol=1e-6)
    one.train().requires_grad_(True)
    set_step(one, 0)
    one(x)  # each sample has a rank of its own
    assert not is_stacked(one, x)


def test_a_compiled_model_is_one_graph_and_follows() -> None:
    one, x = model()
    add(one, "dial", DyLoraConfig(r=4, target_modules=["0"]))
    counter = CompileCounter()
    compiled = torch.compile(one, backend=counter, fullgraph=True)
    with torch.no_grad():
        for weights in ((1, 1, 1), (0.5, 0.3, 0.2), (0.1, 2, 0.7), (0.4, 0.9, 1.1)):
            activate(one, "abc", *weights)
            torch.testing.assert_close(compiled(x), summed(one, x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2  # at first, numbers are constants to the compiler


def test_a_compiled_model_with_prepared_adapters_is_compiled_once() -> None:
    one, x = model()
    CHANGES["prepared"](one)
    counter = CompileCounter()
    compiled = torch.compile(one, backend=counter, fullgraph=True)
    with torch.no_grad():
        for weights in ((1, 1, 1), (0.5, 0.3, 0.2), (0.1, 2, 0.7)):
            activate(one, "abc", *weights)
            torch.testing.assert_close(compiled(x), summed(one, x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_a_pipeline_draws_what_peft_draws(pipeline, monkeypatch) -> None:
    pipe = pipeline()
    for name in ("lierla", "c3lier", "dylora"):
        pipe.load_lora_weights(GOLDEN / "sd15" / f"{name}.safetensors", adapter_name=name)
    given = expected("sd15")
    steps = [
        lambda: pipe.set_adapters(["lierla", "c3lier", "dylora"], [0.6, {"unet": {"down": 0.2, "up": 0.7}}, 0.5]),
        lambda: set_rank(pipe, 4),
        lambda: pipe.load_lora_weights(
            Adapter.load(GOLDEN / "sd15" / "c3lier.safetensors").truncate(1), adapter_name="c3lier", hotswap=True
        ),
        lambda: pipe.delete_adapters("lierla"),
        pipe.disable_lora,
        pipe.enable_lora,
    ]
    layers = {type(layer) for layer in pipe.unet.modules() if isinstance(layer, LoraLayer)}
    for step in steps:
        step()
        ours = outputs(pipe, given)
        with pytest.MonkeyPatch.context() as patch:
            for kind in layers:
                home = next(one for one in kind.__mro__ if "forward" in vars(one))
                patch.setattr(home, "forward", home.forward.stock)
            theirs = outputs(pipe, given)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    pipe.unload_lora_weights()
    with pytest.raises(AdapterError):
        set_rank(pipe, 4)


@pytest.mark.parametrize("count", [1, 3])
def test_an_input_by_name(count) -> None:
    """AnimateDiff's motion modules call their projections so."""
    one, x = model(count=count)
    assert torch.equal(one[0](input=x), one[0](x))
