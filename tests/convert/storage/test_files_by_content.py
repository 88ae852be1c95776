"""Which format a file has is told by its first bytes, whatever it is called."""

import pytest
import torch
from safetensors.torch import save_file

from lora_adapters.convert import Adapter, AdapterError, LowRank, ModuleName
from lora_adapters.convert.programs.info import hash_is_right
from lora_adapters.convert.storage.files import is_safetensors, read_tensors

MODULE = ModuleName("unet", "mid_block.attentions.0.proj_in")
PAIR = LowRank(torch.ones(2, 4), torch.ones(4, 2), 1.0)


@pytest.mark.parametrize("name", ["noext", "UP.SAFETENSORS", "a.ckpt", "a.pt", "a.bin", "0f3c9a", "v1.5"])
def test_safetensors_under_any_name(name, tmp_path) -> None:
    whole = Adapter({MODULE: PAIR}).save(tmp_path / "whole.safetensors")
    file = whole.rename(tmp_path / name)
    assert is_safetensors(file)
    back = Adapter.load(file)
    assert torch.equal(back.modules[MODULE].delta(), PAIR.delta())
    assert hash_is_right(file, back.metadata)
    assert Adapter.load(tmp_path, weight_name=name).metadata == back.metadata


@pytest.mark.parametrize("name", ["UP.SAFETENSORS", "a.CKPT", "a.Pt"])
def test_the_only_file_of_a_folder_is_found_by_an_ending_in_capitals(name, tmp_path) -> None:
    Adapter({MODULE: PAIR}).save(tmp_path / "whole.safetensors").rename(tmp_path / name)
    assert set(Adapter.load(tmp_path).modules) == {MODULE}


@pytest.mark.parametrize("name", ["noext", "a.ckpt", "a.PT"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_under_any_other_name(zipped, name, tmp_path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert not is_safetensors(tmp_path / name)
    assert torch.equal(read_tensors(tmp_path / name)[0]["a"], torch.ones(2))


@pytest.mark.parametrize("name", ["a.safetensors", "a.SafeTensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_called_safetensors(zipped, name, tmp_path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(AdapterError, match=r"is a PyTorch pickle despite its name: .*\.ckpt"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\0" * 9, b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1"]
)
def test_neither(content, tmp_path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(AdapterError, match="is truncated or not a safetensors file"):
        read_tensors(file)
    other = file.rename(tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="cannot be read as plain weights"):
        read_tensors(other)


def test_a_truncated_file_without_an_ending_is_called_so(tmp_path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "whole")
    (tmp_path / "torn").write_bytes((tmp_path / "whole").read_bytes()[:500])
    with pytest.raises(AdapterError, match="truncated"):
        read_tensors(tmp_path / "torn")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_adapters_of_eight_bits_are_saved(format, dtype, tmp_path) -> None:
    narrow = Adapter({MODULE: LowRank(torch.randn(4, 8), torch.randn(8, 4), 3.0)}).to(dtype)
    back = Adapter.load(narrow.save(tmp_path / "a.safetensors", format))
    torch.testing.assert_close(back.modules[MODULE].delta().flatten(), narrow.modules[MODULE].delta().flatten())
    if format == "kohya":
        assert back.modules[MODULE].up.dtype == dtype
        assert back.modules[MODULE].alpha == 3


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.float32])
def test_an_alpha_that_no_file_holds(dtype, tmp_path) -> None:
    large = Adapter({MODULE: LowRank(torch.ones(2, 4, dtype=dtype), torch.ones(4, 2, dtype=dtype), 1e39)})
    with pytest.raises(AdapterError, match=r"alpha 1e\+39 is too large"):
        large.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
