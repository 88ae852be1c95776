"""Several threads that put adapters into models of their own at once."""

import multiprocessing
import sys
import threading
import time

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import nn

from lora_adapters import adapted_models
from lora_adapters.convert.deltas.full import Full
from lora_adapters.convert.deltas.hadamard import Hadamard
from lora_adapters.convert.deltas.low_rank import LowRank
from lora_adapters.injection import place
from lora_adapters.types.registry import facts_of_metadata


@pytest.fixture(autouse=True)
def switching():
    """Threads change places as often as they can."""
    interval, register = sys.getswitchinterval(), nn.Module.register_parameter
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    nn.Module.register_parameter = register


def in_threads(*works) -> None:
    """Run all at once; the first error of any."""
    errors = []

    def guarded(work) -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_a_model_may_be_noted_while_another_thread_looks_at_all() -> None:
    models = [nn.Identity() for _ in range(3000)]

    def note() -> None:
        for model in models:
            adapted_models.remember(model)

    def look() -> None:
        while len(adapted_models.remembered()) < len(models):
            pass

    in_threads(note, look)
    assert set(models) <= set(adapted_models.remembered())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_are_put_into_models_one_by_one() -> None:
    before = nn.Module.register_parameter

    def work(width: int) -> None:
        torch.set_num_threads(1)
        for turn in range(5):
            size = width + 8 * turn
            model = nn.Sequential(*(nn.Linear(size, size) for _ in range(10)))
            pairs = {str(path): LowRank(torch.randn(2, size), torch.randn(size, 2), 2.0) for path in range(5)}
            place(model, pairs, "ours", facts_of_metadata({}))
            config = LoraConfig(r=2, target_modules=["7", "8", "9"])
            inject_adapter_in_model(config, model, "stock", low_cpu_mem_usage=True)
            for path, pair in pairs.items():
                layer = model.get_submodule(path)
                assert torch.equal(layer.lora_A["ours"].weight, pair.down)
                assert torch.equal(layer.lora_B["ours"].weight, pair.up)

    in_threads(*(lambda width=width: work(width) for width in (16, 17, 18, 19)))
    assert nn.Module.register_parameter is before
    assert not nn.Linear(2, 2).weight.is_meta


def test_weights_have_memory_while_another_thread_opens_a_model() -> None:
    """What `from_pretrained` does meanwhile: torch.nn.Module is patched so that parameters have no memory."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    pair = LowRank(torch.randn(2, 4), torch.randn(4, 2), 2.0)
    loha = Hadamard(*(torch.randn(shape) for shape in [(4, 2), (2, 4)] * 2), 2.0)
    with init_empty_weights():
        assert nn.Linear(1, 1).weight.is_meta
        place(model, {"0": pair}, "pairs", facts_of_metadata({}))
        place(model, {"1": loha, "2": Full(torch.randn(4))}, "others", facts_of_metadata({}))
    assert torch.equal(model[0].lora_A["pairs"].weight, pair.down)
    assert torch.equal(model[0].lora_B["pairs"].weight, pair.up)
    assert torch.equal(model[1].lora_A["others"].change.w1_a, loha.w1_a)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_layers_are_made_without_patching_torch(monkeypatch) -> None:
    """A thread that opens a model at that time would put the patch back when it has ended its own."""
    stock, register = lora.Linear.update_layer, nn.Module.register_parameter

    def update_layer(self, *args, **kwargs):
        assert nn.Module.register_parameter is register
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "update_layer", update_layer)
    size = 37  # of no layer before
    random = torch.get_rng_state()
    model = nn.Sequential(nn.Linear(size, size, device="meta"))
    place(model, {"0": LowRank(torch.ones(2, size), torch.ones(size, 2), 2.0)}, "a", facts_of_metadata({}))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
def test_a_process_that_is_forked_while_an_adapter_is_placed_can_place_its_own() -> None:
    """The thread that holds the lock does not exist in the new process."""
    entered = threading.Event()

    def placing() -> None:
        with adapted_models.CHANGING:
            entered.set()
            time.sleep(0.2)

    thread = threading.Thread(target=placing)
    thread.start()
    entered.wait()
    child = multiprocessing.get_context("fork").Process(target=_take_the_lock)
    child.start()
    child.join(20)
    stuck = child.is_alive()
    child.kill()
    thread.join()
    assert (stuck, child.exitcode) == (False, 0)


def _take_the_lock() -> None:
    raise SystemExit(0 if adapted_models.CHANGING.acquire(timeout=5) else 1)
