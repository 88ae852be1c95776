"""Tensors brought to the device that computes."""

import torch


def moved(
    tensor: torch.Tensor, target: torch.Tensor | torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor on another device, without waiting for the copy where that is safe.

    CUDA copies from a temporary in pageable memory are staged before the call returns. MPS may read the temporary
    after it is gone (pytorch issue 139550), so its copies are waited for.

    Args:
        tensor: any shape.
        target: a device, or a tensor whose device, and whose dtype unless `dtype` is given, are taken.
        dtype: the new dtype; None keeps the tensor's, or takes that of `target`.

    Returns:
        The tensor itself where nothing changes, else a copy.
    """
    if isinstance(target, torch.Tensor):
        device, dtype = target.device, dtype or target.dtype
    else:
        device = torch.device(target)
    return tensor.to(device, dtype, non_blocking=device.type != "mps")


def computing_device(model: torch.nn.Module) -> torch.device:
    """The device that a model's inputs go to: that of its weights, or where its offloading brings them to compute."""
    if hasattr(model, "_hf_hook"):
        for part in model.modules():
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(model.parameters()).device
