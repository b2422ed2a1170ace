"""OpenMMLab hook: test in the deploy form, leave training untouched."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from fastvit_mm.errors import FastViTError, one_line
from fastvit_mm.reparameterize import compare, network, reparameterize, unwrap
from fastvit_mm.running.randomness import random_states, set_random_states


@contextmanager
def one_outcome() -> Iterator[None]:
    """Make a failure on one rank fail all ranks, which would otherwise wait for it for ever.

    Raises:
        FastViTError: on the other ranks, with the message of the one that failed.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = all_gather_object(failure and one_line(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise FastViTError(f'rank {rank} failed: {message}')


@HOOKS.register_module()
class ReparameterizeHook(Hook):
    """Run every test in the deploy form; afterwards the runner has its own model back.

    The test runs on a merged copy, so that it cannot affect the weights, optimizer, EMA and
    train/eval modes of the run, and the states of the random generators are restored (data
    loaders use them). The hook runs after EMAHook, so that the averaged weights are merged.

    Raises:
        FastViTError: on any rank, there is nothing to merge, or the outputs differ by more than
            rounding explains.
    """

    priority = 'VERY_LOW'

    def __init__(self):
        self.trained = self.merged = None
        self.states = None

    def before_run(self, runner: Runner) -> None:
        self.restore(runner)  # an exception in a test skips after_test_epoch

    before_train = before_val = before_run

    def before_test(self, runner: Runner) -> None:
        self.restore(runner)
        self.states = random_states()

    def before_test_epoch(self, runner: Runner) -> None:
        with one_outcome():
            self.merged = self.merge(runner)
        self.trained, runner.model = runner.model, self.merged

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.restore(runner)

    def after_test(self, runner: Runner) -> None:
        set_random_states(self.states)

    def restore(self, runner: Runner) -> None:
        if self.trained is not None and runner.model is self.merged:
            runner.model = self.trained
        self.trained = self.merged = None

    def merge(self, runner: Runner) -> nn.Module:
        """The deploy form of the runner's model, checked against it."""
        model = unwrap(runner.model)
        merged = reparameterize(model)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, merged))
        agreement = compare(model, merged, self.probe(runner, model))
        runner.logger.info(
            f'reparameterized {type(network(model)).__name__}: {before:,} -> {after:,} parameters; '
            f'largest relative difference of the outputs {agreement.difference:.1e} '
            f'(rounding explains {agreement.limit:.1e})'
        )
        if not agreement.explained:
            raise FastViTError(
                f'the deploy form differs from the training form by {agreement.difference:.1e}, '
                f'more than rounding explains ({agreement.limit:.1e}): '
                'test without --reparam and report the model'
            )
        return merged

    @staticmethod
    def probe(runner: Runner, model: nn.Module) -> Tensor:
        """The first image of the test set, preprocessed for the model."""
        loader = runner.test_dataloader
        batch = loader.collate_fn([loader.dataset[0]])
        if isinstance(model, BaseTTAModel):  # the first of its augmentations
            batch = {key: augmented[0] for key, augmented in batch.items()}
        inputs = network(model).data_preprocessor(batch, False)['inputs']
        return torch.stack(inputs) if isinstance(inputs, list) else inputs
