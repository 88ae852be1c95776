"""Finding a device by name."""

import torch

from lora_adapters.convert.errors import AdapterError, first_line


def device_of(name: str | None, dtype: torch.dtype = torch.float64) -> torch.device:
    """Find a device by name.

    Args:
        name: PyTorch's name, such as "cuda:1"; None is the CPU.
        dtype: A dtype that the device must support. Apple's mps has no float64, which the file tools use.

    Returns:
        The device.

    Raises:
        AdapterError: The device does not exist, or does not support the dtype.
    """
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = first_line(error)
        raise AdapterError(f"device {name} cannot be used ({reason})") from None
    return device
