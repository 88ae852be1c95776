"""Loading takes the memory of the adapter, once: neither the file's pages nor anything computed stays beside it."""

import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lora_adapters import Adapter
from lora_adapters.convert import LowRank, ModuleName
from lora_adapters.convert.deltas import read_module
from lora_adapters.convert.storage import mapped_pages
from tests.benchmarks.peak_memory import peak_above_rest
from tests.benchmarks.speed.pipelines import weightless

from .conftest import make_pipeline

MIB = 2**20
OBJECTS = 8  # MiB: Python's objects of the layers, pages between two times of giving back
RANK = 128
CASES = [
    pytest.param("kohya", torch.float16, id="kohya"),
    pytest.param("kohya", torch.float32, id="kohya-float32"),
    pytest.param("diffusers", torch.float16, id="diffusers"),
    pytest.param("peft", torch.float16, id="peft"),
]


def wide_pipeline():
    """A pipeline with a U-Net of SD1.5's widest layers, in float16, whose own weights take no memory."""
    pipe = make_pipeline()
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipe.unet = weightless(lambda: UNet2DConditionModel(block_out_channels=(1280,), layers_per_block=2, **blocks))
    return pipe


def linear_layers(pipe):
    named = pipe.unet.named_modules()
    return {
        ModuleName("unet", path): layer
        for path, layer in named
        if ".transformer_blocks." in path and isinstance(layer, nn.Linear)
    }


def pair(layer, dtype):
    down, up = torch.randn(RANK, layer.in_features), torch.randn(layer.out_features, RANK)
    return LowRank(down.to(dtype), up.to(dtype), float(RANK))


def loha(layer, dtype):
    """A change of LyCORIS' whose four factors are together as large as those of a pair."""
    out_in, half = (layer.out_features, layer.in_features), RANK // 2
    shapes = {
        "w1_a": (out_in[0], half),
        "w1_b": (half, out_in[1]),
        "w2_a": (out_in[0], half),
        "w2_b": (half, out_in[1]),
    }
    tensors = {f"hada_{name}": torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return read_module({**tensors, "alpha": torch.tensor(8.0)})


def bytes_in(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def peak(pipe, source):
    """MiB at the highest while a second adapter is loaded: the first time, modules are imported too."""
    pipe.load_lora_weights(source, adapter_name="first")
    pipe.unload_lora_weights()
    return peak_above_rest(lambda: pipe.load_lora_weights(source, adapter_name="a"))


def taken(pipe):
    return bytes_in(one for name, one in pipe.unet.named_parameters() if ".lora_" in name) / MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the pages of files are given back on Linux alone")
@pytest.mark.parametrize(("format", "dtype"), CASES)
def test_a_load_takes_the_adapters_own_memory(format, dtype, tmp_path) -> None:
    pipe = wide_pipeline()
    adapter = Adapter({name: pair(layer, dtype) for name, layer in linear_layers(pipe).items()})
    path = adapter.save(tmp_path / ("a" if format == "peft" else "a.safetensors"), format=format)
    file = bytes_in(tensor for one in adapter.modules.values() for tensor in (one.down, one.up)) / MIB
    found = peak(pipe, path)
    own = taken(pipe)
    assert own > 20
    assert found < max(1.15 * own, file) + OBJECTS
    for name, one in adapter.modules.items():
        layer = pipe.unet.get_submodule(name.path)
        assert torch.equal(layer.lora_A["a"].weight, one.down.half())
        assert torch.equal(layer.lora_B["a"].weight, one.up.half())


@pytest.mark.skipif(sys.platform != "linux", reason="the pages of files are given back on Linux alone")
def test_so_does_one_of_another_kind(tmp_path) -> None:
    pipe = wide_pipeline()
    adapter = Adapter({name: loha(layer, torch.float16) for name, layer in linear_layers(pipe).items()})
    found = peak(pipe, adapter.save(tmp_path / "a.safetensors"))
    own = taken(pipe)
    assert own > 20
    assert found < 1.15 * own + OBJECTS


def test_pages_that_are_given_back_are_read_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mapped_pages, "_MOST", 1)
    pipe = wide_pipeline()
    shared = torch.randn(RANK, 1280)
    layers = [(name, layer) for name, layer in linear_layers(pipe).items() if layer.in_features == 1280]
    adapter = Adapter({name: LowRank(shared, torch.randn(layer.out_features, RANK), 8.0) for name, layer in layers})
    pipe.load_lora_weights(adapter.save(tmp_path / "a.safetensors"), adapter_name="a")
    for name, _ in layers:
        assert torch.equal(pipe.unet.get_submodule(name.path).lora_A["a"].weight, shared.half())


def test_what_others_changed_in_memory_stays(tmp_path) -> None:
    pipe = wide_pipeline()
    name, layer = next(iter(linear_layers(pipe).items()))
    path = Adapter({name: pair(layer, torch.float16)}).save(tmp_path / "a.safetensors")
    own = Adapter.load(path)
    own.modules[name].down.fill_(2)
    pipe.load_lora_weights(path, adapter_name="a")
    pipe.load_lora_weights(own, adapter_name="b")
    assert own.modules[name].down.eq(2).all()
    layer = pipe.unet.get_submodule(name.path)
    assert layer.lora_A["b"].weight.eq(2).all()
    assert not layer.lora_A["a"].weight.eq(2).all()


def full(layer, dtype):
    return read_module({"diff": torch.randn(layer.weight.shape).to(dtype), "diff_b": torch.randn(len(layer.weight))})


def difference_of(pipe, name):
    return pipe.unet.get_submodule(name.path).lora_A["a"].diff


@pytest.mark.skipif(sys.platform != "linux", reason="where a file is mapped is known on Linux alone")
def test_full_differences_in_the_models_dtype_stay_mapped(tmp_path) -> None:
    pipe = wide_pipeline()
    adapter = Adapter(
        {name: full(layer, torch.float16) for name, layer in linear_layers(pipe).items() if layer.bias is not None}
    )
    path = adapter.save(tmp_path / "a.safetensors")
    file = path.stat().st_size / MIB
    assert peak(pipe, path) < OBJECTS < file
    bits = path.read_bytes()
    with torch.no_grad():
        for name, one in adapter.modules.items():
            difference = difference_of(pipe, name)
            assert torch.equal(difference, one.diff)
            difference.fill_(1)  # as training and exchanging do: the file stays as it is
    assert path.read_bytes() == bits
    path.unlink()
    assert all(difference_of(pipe, name).eq(1).all() for name in adapter.modules)


@pytest.mark.parametrize("why", ["dtype", "option", "in memory"])
def test_they_are_copied_where_they_are_to_be_other_numbers_or_others(why, tmp_path) -> None:
    pipe = wide_pipeline()
    name, layer = next((name, layer) for name, layer in linear_layers(pipe).items() if layer.bias is not None)
    dtype = torch.bfloat16 if why == "dtype" else torch.float16
    path = Adapter({name: full(layer, dtype)}).save(tmp_path / "a.safetensors")
    before = Adapter.load(path).modules[name].diff.clone()
    source = Adapter.load(path) if why == "in memory" else path
    pipe.load_lora_weights(source, adapter_name="a", low_cpu_mem_usage=why != "option")
    with path.open("r+b") as file:  # over the numbers that are mapped, where any are
        file.seek(path.stat().st_size - before.nbytes)
        file.write(bytes(before.nbytes))
    assert torch.equal(difference_of(pipe, name), before.half())
