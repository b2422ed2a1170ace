"""State dicts: parts of one, and differences between two."""

from collections.abc import Iterable

from torch import Tensor

State = dict[str, Tensor]


def starting_with(state: State, prefix: str) -> State:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def without(state: State, keys: Iterable[str]) -> State:
    keys = set(keys)
    return {k: v for k, v in state.items() if k not in keys}


def first(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ', '.join(keys[:3]) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')


def incompatible(target: State, state: State) -> tuple[set[str], set[str]]:
    """Keys missing from ``state`` and unexpected ones in it; keys of another shape are in both."""
    shapes = {k for k in target if k in state and target[k].shape != state[k].shape}
    # Files from before PyTorch 0.4.1 have no counters; they matter only without momentum.
    missing = {k for k in set(target) - set(state) if not k.endswith('num_batches_tracked')}
    return missing | shapes, set(state) - set(target) | shapes


def differences(missing, unexpected, state, target) -> str:
    shapes = missing & unexpected
    details = []
    if missing - shapes:
        details.append(f'missing in the file: {first(missing - shapes)}')
    if unexpected - shapes:
        details.append(f'unknown to the model: {first(unexpected - shapes)}')
    if shapes:
        sizes = (f'{k} {tuple(state[k].shape)} for {tuple(target[k].shape)}' for k in shapes)
        details.append(f'of another shape: {first(sizes)}')
    return '; '.join(details)
