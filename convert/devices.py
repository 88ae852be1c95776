"""Devices by the names that options have for them."""

import torch

from lora_adapters.convert.errors import AdapterError, first_line


def device_of(name: str | None, dtype: torch.dtype = torch.float64) -> torch.device:
    """A device that is there and has numbers of `dtype`, the CPU by default; AdapterError for any other.

    Apple's (mps) has no float64, in which the file tools compute.
    """
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise AdapterError(f"device {name} cannot be used ({reason})") from None
    return device
