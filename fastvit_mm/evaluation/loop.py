"""Testing several forms of a model on the same images."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from torch import nn

from fastvit_mm.reparameterize import network


class FormsLoop(TestLoop):
    """mmengine's test loop with several models, for images that are slow to prepare.

    Args:
        evaluator: config of the metrics; each model gets its own.
        models: by name.
    """

    def __init__(self, runner: Runner, dataloader, evaluator, models: dict[str, nn.Module]):
        self.models = models
        self.evaluators: dict[str, Evaluator] = {
            name: runner.build_evaluator(copy.deepcopy(evaluator)) for name in models
        }
        super().__init__(runner, dataloader, next(iter(self.evaluators.values())))
        for one in self.evaluators.values():
            one.dataset_meta = self.evaluator.dataset_meta

    def run(self) -> dict[str, dict[str, float]]:
        """The metrics of each model."""
        self.runner.call_hook('before_test')
        self.runner.call_hook('before_test_epoch')
        for model in self.models.values():
            model.eval()
        for index, batch in enumerate(self.dataloader):
            self.run_iter(index, batch)
        size = len(self.dataloader.dataset)
        metrics = {name: one.evaluate(size) for name, one in self.evaluators.items()}
        together = {f'{name}/{k}': v for name, one in metrics.items() for k, v in one.items()}
        self.runner.call_hook('after_test_epoch', metrics=together)
        self.runner.call_hook('after_test')
        return metrics

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: dict) -> None:
        hook = dict(batch_idx=idx, data_batch=data_batch)
        self.runner.call_hook('before_test_iter', **hook)
        for name, model in self.models.items():
            # a model writes its predictions into the batch
            outputs = model.test_step(copy.deepcopy(data_batch))
            self.evaluators[name].process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook('after_test_iter', outputs=outputs, **hook)


@contextmanager
def only_classes(models: Sequence[nn.Module], labels: Sequence[int] | None) -> Iterator[None]:
    """Within it, the models of mmpretrain choose among these classes, numbered from 0; None: all.

    Logits are selected, not probabilities: those of unlikely classes can all be zero.
    """
    with ExitStack() as stack:
        for model in models if labels is not None else ():
            head, preprocessor = network(model).head, network(model).data_preprocessor
            stack.enter_context(
                head.register_forward_hook(lambda module, args, logits: logits[:, labels])
            )
            if getattr(preprocessor, 'to_onehot', False):  # of all classes; only losses need it
                preprocessor.to_onehot = False
                stack.callback(setattr, preprocessor, 'to_onehot', True)
        yield
