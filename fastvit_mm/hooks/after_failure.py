"""OpenMMLab hook: a test or validation that failed leaves nothing behind."""

import itertools

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import get_state_dict, weights_to_cpu
from torch import Tensor

from fastvit_mm.reparameterize import unwrap

from .reparameterize import ReparameterizeHook


@HOOKS.register_module()
class AfterFailureHook(Hook):
    """Undo what a test or validation that ended in an exception has left behind.

    mmengine then leaves an EMAHook's averaged weights in the model and the trained ones in the
    average, and the results of the images that were tested in the metrics; a ReparameterizeHook
    leaves its merged copy in the runner. All is put right before anything else happens: training,
    another test, a checkpoint.
    """

    priority = 'HIGHEST'  # before EMAHook exchanges weights, or makes a new average

    def __init__(self):
        self.kept: list[tuple[EMAHook, Tensor, Tensor]] = []

    def before_run(self, runner: Runner) -> None:
        self.mend(runner)

    before_train = before_val = before_test = before_run

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.mend(runner):
            checkpoint['state_dict'] = weights_to_cpu(get_state_dict(unwrap(runner.model)))

    def mend(self, runner: Runner) -> bool:
        """Give the runner its model and the model its weights; whether it did not have them."""
        merged = [h for h in runner.hooks if isinstance(h, ReparameterizeHook) and h.merged]
        for hook in merged:
            hook.restore(runner)
        exchanged = [h for h, weight, before in self.kept if not torch.equal(weight, before)]
        for hook in exchanged:
            hook._swap_ema_parameters()
        self.kept = []
        return bool(merged or exchanged)

    def before_val_epoch(self, runner: Runner) -> None:
        self.begin(runner, runner.val_loop)

    def before_test_epoch(self, runner: Runner) -> None:
        self.begin(runner, runner.test_loop)

    def begin(self, runner: Runner, loop) -> None:
        for metric in loop.evaluator.metrics:
            metric.results.clear()
        self.kept = [
            (hook, weight, weight.detach().clone())
            for hook in runner.hooks
            if isinstance(hook, EMAHook) and (weight := unlike_its_average(hook)) is not None
        ]

    def after_val(self, runner: Runner) -> None:
        self.kept = []

    after_test = after_val


def unlike_its_average(hook: EMAHook) -> Tensor | None:
    """A weight of the model that differs from its average; None if there is none."""
    model, average = hook.src_model, hook.ema_model.module
    own = itertools.chain(model.parameters(), model.buffers())
    averaged = itertools.chain(average.parameters(), average.buffers())
    pairs = [(o, a) for o, a in zip(own, averaged, strict=True) if o.isfinite().all()]
    if not hook.ema_model.update_buffers:
        pairs = [(o, a) for o, a in pairs if isinstance(o, torch.nn.Parameter)]
    return next((o for o, a in pairs if not torch.equal(o, a)), None)
