"""Devices by the names that options have for them."""

import torch

from lora_adapters.convert.errors import AdapterError, first_line


def device_of(name: str | None, dtype: torch.dtype = torch.float64) -> torch.device:
    """The device of a name.

    Args:
        name: PyTorch's name, such as "cuda:1"; None is the CPU.
        dtype: What it has to compute in. Apple's mps has no float64, which the file tools use.

    Returns:
        The device.

    Raises:
        AdapterError: It is missing, or does not have the dtype.
    """
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise AdapterError(f"device {name} cannot be used ({reason})") from None
    return device
