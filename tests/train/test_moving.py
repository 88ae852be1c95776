import pytest
import torch

from lora_adapters.train.moving import moved


@pytest.mark.parametrize(("device", "asynchronous"), [("cuda", True), ("mps", False)])
def test_copies_to_mps_are_waited_for(device, asynchronous, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: calls.append((args, options)) or self)
    moved(torch.zeros(2), torch.device(device), torch.float16)
    assert calls == [((torch.device(device), torch.float16), {"non_blocking": asynchronous})]


def test_device_and_dtype_of_another_tensor() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    assert moved(torch.ones(2), like).dtype == torch.bfloat16
    assert moved(torch.ones(2), like, torch.float64).dtype == torch.float64
    assert moved(torch.ones(2), "cpu").dtype == torch.float32
