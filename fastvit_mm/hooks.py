"""OpenMMLab hook: test in the deploy form, leave training untouched."""

import random

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .errors import FastViTError
from .reparameterize import compare, reparameterize, unwrap


def random_states():
    """State of every generator that training draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@HOOKS.register_module()
class ReparameterizeHook(Hook):
    """Run every test in the deploy form; afterwards the runner has its own model back.

    The test runs on a merged copy, so weights, optimizer, EMA and train/eval modes of the run
    cannot be affected, and the random generators are put back where they were (a data loader
    draws from them). Comes after EMAHook, so that the averaged weights are merged.

    Raises:
        FastViTError: nothing to merge, or outputs that differ by more than rounding explains.
    """

    priority = 'VERY_LOW'

    def __init__(self):
        self.trained = None
        self.states = None

    def before_test(self, runner: Runner) -> None:
        self.states = random_states()

    def before_test_epoch(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        merged = reparameterize(model)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, merged))
        agreement = compare(model, merged, self.probe(runner, model))
        runner.logger.info(
            f'reparameterized {type(model).__name__}: {before:,} -> {after:,} parameters; '
            f'largest relative difference of the outputs {agreement.difference:.1e} '
            f'(rounding explains {agreement.limit:.1e})'
        )
        if not agreement.explained:
            raise FastViTError(
                f'the deploy form differs from the training form by {agreement.difference:.1e}, '
                f'more than rounding explains ({agreement.limit:.1e}): '
                'test without --reparam and report the model'
            )
        self.trained, runner.model = runner.model, merged

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.restore(runner)

    def after_test(self, runner: Runner) -> None:
        set_random_states(self.states)

    def before_train(self, runner: Runner) -> None:
        # A test that an exception ended never came to after_test_epoch.
        self.restore(runner)

    def restore(self, runner: Runner) -> None:
        if self.trained is not None:
            runner.model, self.trained = self.trained, None

    @staticmethod
    def probe(runner: Runner, model):
        """The first image of the test set, as the model sees it."""
        loader = runner.test_dataloader
        batch = loader.collate_fn([loader.dataset[0]])
        inputs = model.data_preprocessor(batch, False)['inputs']
        return torch.stack(inputs) if isinstance(inputs, list) else inputs
