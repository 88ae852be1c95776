"""Loading takes the memory of the adapter, once: neither the file's pages nor anything computed stays beside it."""

import copy
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from torch import nn

from lora_adapters import Adapter
from lora_adapters.convert import LowRank, ModuleName
from lora_adapters.convert.deltas import read_module
from lora_adapters.convert.storage import mapped_pages
from tests.benchmarks.peak_memory import peak_above_rest
from tests.benchmarks.speed.pipelines import give_weights, weightless

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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_full_differences_stay_mapped(dtype, tmp_path) -> None:
    pipe = wide_pipeline()
    adapter = Adapter(
        {name: full(layer, dtype) for name, layer in linear_layers(pipe).items() if layer.bias is not None}
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
def test_they_are_copied_where_they_are_wider_or_are_to_be(why, tmp_path) -> None:
    pipe = wide_pipeline()
    name, layer = next((name, layer) for name, layer in linear_layers(pipe).items() if layer.bias is not None)
    dtype = torch.float32 if why == "dtype" else torch.bfloat16
    path = Adapter({name: full(layer, dtype)}).save(tmp_path / "a.safetensors")
    before = Adapter.load(path).modules[name].diff.clone()
    source = Adapter.load(path) if why == "in memory" else path
    pipe.load_lora_weights(source, adapter_name="a", low_cpu_mem_usage=why != "option")
    with path.open("r+b") as file:  # over the numbers that are mapped, where any are
        file.seek(path.stat().st_size - before.nbytes)
        file.write(bytes(before.nbytes))
    assert torch.equal(difference_of(pipe, name), before.half())


def one_difference(pipe, tmp_path, dtype=torch.bfloat16):
    """A file with a full difference of one linear layer, the layer's name, and the change."""
    layer_of = linear_layers(pipe)
    name = next(name for name, layer in layer_of.items() if layer.bias is not None)
    change = full(layer_of[name], dtype)
    return Adapter({name: change}).save(tmp_path / f"{dtype}.safetensors"), name, change


def output(pipe, name, inputs):
    with torch.no_grad():
        return pipe.unet.get_submodule(name.path)(inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="where a file is mapped is known on Linux alone")
@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("model", [torch.float16, torch.float32], ids=str)
def test_a_difference_in_another_dtype_does_what_its_copy_does(model, weight, tmp_path) -> None:
    pipe = wide_pipeline()
    pipe.unet.to(model)
    path, name, change = one_difference(pipe, tmp_path)
    inputs = torch.randn(3, pipe.unet.get_submodule(name.path).in_features).to(model)
    pipe.load_lora_weights(path, adapter_name="a")
    assert difference_of(pipe, name).dtype == torch.bfloat16
    assert pipe.unet.dtype == model
    pipe.set_adapters("a", weight)
    found = output(pipe, name, inputs)
    truth = inputs.double() @ (change.diff.double() * weight).T + change.diff_b.double() * weight
    assert found.dtype == model
    assert (found - truth).abs().max() <= 8 * torch.finfo(model).eps * truth.abs().max()
    pipe.unload_lora_weights()
    pipe.load_lora_weights(path, adapter_name="a", low_cpu_mem_usage=False)
    assert difference_of(pipe, name).dtype == model
    pipe.set_adapters("a", weight)
    assert torch.equal(found, output(pipe, name, inputs))


@pytest.mark.skipif(sys.platform != "linux", reason="where a file is mapped is known on Linux alone")
def test_a_lora_beside_it_gets_inputs_that_are_not_rounded(tmp_path) -> None:
    pipe = wide_pipeline()
    path, name, _ = one_difference(pipe, tmp_path)
    layer = pipe.unet.get_submodule(name.path)
    inputs = torch.randn(3, layer.in_features).half()
    lora = Adapter({name: pair(layer, torch.float16)})
    pipe.load_lora_weights(path, adapter_name="a")
    pipe.load_lora_weights(lora.save(tmp_path / "lora.safetensors"), adapter_name="b")
    outputs = []
    for names in (["a"], ["b"], ["a", "b"]):
        pipe.set_adapters(names)
        outputs.append(output(pipe, name, inputs).double())
    assert torch.allclose(outputs[2], outputs[0] + outputs[1], rtol=0, atol=2e-3 * outputs[2].abs().max())


@pytest.mark.skipif(sys.platform != "linux", reason="where a file is mapped is known on Linux alone")
@pytest.mark.parametrize("how", ["trained", "to", "cast to be trained"])
def test_it_is_converted_where_it_is_trained_or_the_model_is_converted(how, tmp_path) -> None:
    pipe = wide_pipeline()
    path, name, change = one_difference(pipe, tmp_path)
    pipe.load_lora_weights(path, adapter_name="a")
    difference, layer = difference_of(pipe, name), pipe.unet.get_submodule(name.path)
    dtype = torch.float16 if how == "trained" else torch.float32
    if how == "trained":
        pipe.unet.train()
    elif how == "to":
        layer.to(torch.float32)
    else:
        cast_training_params(layer, torch.float32)
    assert difference_of(pipe, name) is difference  # which an optimizer may have by now
    assert difference.dtype == layer.lora_A["a"].weight.dtype == dtype
    assert torch.equal(difference, change.diff.to(dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="where a file is mapped is known on Linux alone")
def test_it_is_exchanged_copied_saved_and_fused_with_all_its_digits(tmp_path) -> None:
    pipe = wide_pipeline()
    give_weights(pipe.unet)
    pipe.unet.half()
    path, name, change = one_difference(pipe, tmp_path)
    other, _, finer = one_difference(pipe, tmp_path, torch.float16)
    pipe.load_lora_weights(path, adapter_name="a")
    state = {key: tensor for key, tensor in pipe.unet.state_dict().items() if ".lora_A.a" in key}
    assert {key.rpartition(".")[2] for key in state} == {"diff", "diff_b"}
    saved = Adapter.from_pipeline(pipe, "a").save(tmp_path / "saved.safetensors")
    assert torch.equal(Adapter.load(saved).modules[name].diff, change.diff)
    twin = copy.deepcopy(pipe.unet.get_submodule(name.path))
    assert torch.equal(twin.lora_A["a"].diff, change.diff)
    before = twin.base_layer.weight.clone()
    pipe.fuse_lora()
    fused = pipe.unet.get_submodule(name.path).base_layer.weight
    assert torch.equal(fused, (before.float() + change.diff.float()).half())
    pipe.unfuse_lora()
    assert torch.equal(pipe.unet.get_submodule(name.path).base_layer.weight, before)
    pipe.load_lora_weights(other, adapter_name="a", hotswap=True)
    assert difference_of(pipe, name).dtype == torch.float16
    assert torch.equal(difference_of(pipe, name), finer.diff)
