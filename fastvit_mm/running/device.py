"""The device that a user asks for."""

import torch

from fastvit_mm.errors import FastViTError


def use(device: str) -> torch.device:
    """``device``, after a look whether it works; a GPU becomes the one that `cuda` means.

    Raises:
        FastViTError: it does not exist or cannot be used.
    """
    try:
        found = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FastViTError(f'--device {device} cannot be used: {reason}') from error
    if found.type == 'cuda':
        torch.cuda.set_device(found)
    return found
