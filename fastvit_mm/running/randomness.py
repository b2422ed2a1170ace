"""The states of the random generators that training uses."""

import random

import numpy as np
import torch


def random_states(gpus: bool = True) -> dict:
    """States of Python's, numpy's and PyTorch's generators, as plain data and tensors.

    Args:
        gpus: include those of the GPUs, if they are in use.
    """
    name, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(name, keys.tolist(), *rest),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if gpus and torch.cuda.is_initialized() else None,
    )


def set_random_states(states: dict) -> None:
    """Restore what :func:`random_states` gave, its tensors on any device; states of more GPUs than
    there are now are left out."""
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
    torch.set_rng_state(states['torch'].cpu())
    if states['cuda'] is not None:
        for number, state in enumerate(states['cuda'][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), number)


def seed_generators(*numbers: int) -> None:
    """Seed the generators of Python, numpy and PyTorch on the CPU from several numbers."""
    seeds = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])
