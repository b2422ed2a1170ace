"""OpenMMLab hook: large batches with the memory of small ones."""

from collections import ChainMap
from collections.abc import Callable

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class AccumulateHook(Hook):
    """Compute each batch in ``parts`` and update the weights once, with the mean of their
    gradients; several ranks exchange gradients once.

    An iteration stays an update. So everything that counts iterations (schedules, averages,
    checkpoints, a resumed run) is as with the whole batch, unlike with mmengine's
    ``accumulative_counts``, where an iteration is a part. A BatchNorm normalizes each part by
    itself. A batch that cannot be divided evenly, such as the last one, is computed in more parts.

    Args:
        parts: at least 1; the data loader's batch size is that of all parts together.
    """

    def __init__(self, parts: int):
        self.parts, self.model, self.before = parts, None, {}

    def before_train(self, runner: Runner) -> None:
        # An attribute, as mmengine's own compiled step.
        self.model = runner.model
        self.before = {k: v for k, v in vars(self.model).items() if k == 'train_step'}
        self.model.train_step = self.stepwise(self.model.train_step)

    def restore(self, runner: Runner) -> None:
        """Leave the model as it was, even while a failed validation has put another there."""
        if self.model is not None:
            del self.model.train_step
            vars(self.model).update(self.before)
        self.model = None

    before_run = after_train = restore

    def stepwise(self, step: Callable) -> Callable:
        def train_step(data: dict, optim_wrapper: OptimWrapper) -> dict[str, torch.Tensor]:
            parts = split(data, self.parts)
            optim_wrapper._accumulative_counts = len(parts)
            optim_wrapper._inner_count, optim_wrapper._max_counts = 0, -1
            logs = [step(part, optim_wrapper=optim_wrapper) for part in parts]
            return {key: mean([log[key] for log in logs if key in log]) for key in ChainMap(*logs)}

        return train_step


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return sum(values) / len(values)


def split(data: dict, parts: int) -> list[dict]:
    """A collated batch in at least ``parts`` parts of equal size, or of one image each.

    Args:
        data: tensors (B, ...) or lists of B.
    """
    count = len(next(iter(data.values())))
    parts = next((n for n in range(parts, count) if count % n == 0), count)
    return [
        {key: values[i : i + count // parts] for key, values in data.items()}
        for i in range(0, count, count // parts)
    ]
