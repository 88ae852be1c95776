"""One `Adapter` class: whatever makes an adapter, a pipeline takes it, and it is taken out of one as the same class."""

import subprocess
import sys

import pytest
import torch

import lora_adapters
from lora_adapters import Adapter, AdapterError, convert
from lora_adapters.convert import live

from .conftest import GOLDEN, expected
from .golden_outputs import outputs

FILE = GOLDEN / "sd15" / "block_dims_alphas_conv.safetensors"


def test_there_is_one_class() -> None:
    from lora_adapters.convert.adapter import Adapter as defined

    assert lora_adapters.Adapter is convert.Adapter is defined


def test_a_subclass_comes_out_of_its_own_methods(pipeline) -> None:
    class Mine(Adapter):
        pass

    pipe = pipeline()
    pipe.load_lora_weights(FILE, adapter_name="a")
    assert type(Mine.from_pipeline(pipe, "a")) is Mine
    assert type(Mine.from_models({"unet": pipe.unet}, "a")) is Mine


@pytest.mark.parametrize("change", ["sum", "svd", "converted", "cut"])
def test_what_convert_returns_goes_into_a_pipeline(change, pipeline, tmp_path) -> None:
    pipe, golden, adapter = pipeline(), expected("sd15"), convert.Adapter.load(FILE)
    given, weight = {
        "sum": (adapter + adapter, 0.5),
        "svd": (adapter.svd(64), 1.0),
        "converted": (convert.Adapter.load(adapter.save(tmp_path / "a.safetensors", "diffusers")), 1.0),
        "cut": (adapter.truncate(max(pair.rank for pair in adapter.modules.values())).scale(2.0), 0.5),
    }[change]
    pipe.load_lora_weights(FILE, adapter_name="file")
    wanted = outputs(pipe, golden)
    pipe.load_lora_weights(given, adapter_name="given")
    pipe.set_adapters(["given"], [weight])
    for part, values in outputs(pipe, golden).items():
        torch.testing.assert_close(values, wanted[part], rtol=1e-3, atol=1e-4)


def test_convert_imports_none_of_the_layers() -> None:
    script = (
        "import sys; from lora_adapters.convert import Adapter\n"
        "print([name for name in ('peft', 'diffusers', 'lora_adapters.adapter') if name in sys.modules])\n"
        "try: Adapter.from_pipeline(None)\n"
        "except AttributeError as error: print(error)\n"
        "print('peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "'NoneType' object has no attribute 'components'", "True"]


def test_convert_without_the_rest_says_so(monkeypatch) -> None:
    monkeypatch.setattr(live, "_load", None)
    with pytest.raises(AdapterError, match="need all of lora_adapters"):
        Adapter.from_pipeline(None)
