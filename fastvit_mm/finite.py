"""Whether numbers are finite."""

from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number of any tensor is NaN or infinite; as fast as adding them up."""
    floats = [t for t in tensors if t.numel() and t.is_floating_point()]
    if torch.nn.utils.get_total_norm(floats).isfinite():
        return True
    # Squares of large numbers overflow as well.
    return all(t.isfinite().all() for t in floats)
