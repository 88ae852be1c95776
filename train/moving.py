"""Moves tensors to the computing device."""

import torch


def moved(
    tensor: torch.Tensor, target: torch.Tensor | torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Move a tensor to a device, asynchronously if that is safe.

    CUDA copies from a temporary in pageable memory are staged before the call returns. MPS may read the temporary
    after it is freed (pytorch issue 139550), so copies to MPS are synchronous.

    Args:
        tensor: Any shape.
        target: A device, or a tensor whose device is used, and whose dtype is used unless `dtype` is given.
        dtype: The new dtype. None keeps the tensor's dtype, or uses the dtype of a tensor `target`.

    Returns:
        The tensor itself if nothing changes, else a copy.
    """
    if isinstance(target, torch.Tensor):
        device, dtype = target.device, dtype or target.dtype
    else:
        device = torch.device(target)
    return tensor.to(device, dtype, non_blocking=device.type != "mps")


def computing_device(model: torch.nn.Module) -> torch.device:
    """The device for a model's inputs: that of its weights, or with offloading the device on which it runs."""
    if hasattr(model, "_hf_hook"):
        for part in model.modules():
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(model.parameters()).device
