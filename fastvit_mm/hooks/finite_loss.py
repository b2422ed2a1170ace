"""OpenMMLab hook: a loss or a gradient that is not finite never reaches the weights."""

from collections.abc import Iterator
from itertools import chain
from weakref import ref

import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from fastvit_mm.errors import FastViTError
from fastvit_mm.finite import all_finite
from fastvit_mm.reparameterize import network

LIMIT = 50  # steps in a row that a loss scaler may skip: it halves the scale in each


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop before the update when a loss or the gradients are NaN or infinite.

    In mixed precision, gradients that overflow are normal: the loss scaler skips the step and
    lowers its scale. Only a loss that is not finite, or 50 such steps in a row, counts.

    Args:
        action: 'stop', or 'skip' to leave out the update, with the running statistics as they
            were before the batch, and to count (``skipped`` in the message hub).

    Raises:
        FastViTError: with the iteration, the terms of the loss, the batch's files, and the
            last checkpoint.
    """

    priority = 'VERY_HIGH'

    def __init__(self, action: str = 'stop'):
        if action not in ('stop', 'skip'):
            raise FastViTError(f"action={action!r}: FiniteLossHook's is 'stop' or 'skip'")
        self.action = action
        self.handles, self.batch, self.losses, self.buffers = [], None, [], []

    def before_train(self, runner: Runner) -> None:
        self.restore(runner)
        self.runner, self.unchanged = ref(runner), 0  # a copy of the model copies this hook
        self.handles = [
            network(runner.model).register_forward_hook(self.note_losses, with_kwargs=True),
            runner.optim_wrapper.optimizer.register_step_pre_hook(self.before_step),
        ]

    def after_train(self, runner: Runner) -> None:
        self.restore(runner)

    def restore(self, runner: Runner) -> None:
        """Leave model and optimizer as they were."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.batch, self.losses, self.buffers = [], None, [], []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self.batch, self.losses, self.judged = data_batch, [], False
        if self.action == 'skip':
            buffers = network(runner.model).buffers()
            self.buffers = [(buffer, buffer.clone()) for buffer in buffers]

    def note_losses(self, module: nn.Module, args, kwargs: dict, output) -> None:
        if kwargs.get('mode') == 'loss' and isinstance(output, dict):
            losses = {k: v for k, v in output.items() if 'loss' in k}
            # a batch may be computed in parts
            self.losses.append({k: [t.detach() for t in each([v])] for k, v in losses.items()})

    def all_losses(self) -> Iterator[Tensor]:
        return (loss for part in self.losses for loss in each(part.values()))

    def before_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        """Called with the gradients of all ranks; the optimizer ignores parameters without one."""
        found = getattr(optimizer, 'found_inf', None)
        if found is not None and found.item():
            return  # a fused optimizer, which itself skips the step for the loss scaler
        self.judged, self.unchanged = True, 0
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.finite([*self.all_losses(), *gradients]):
            return
        self.refuse('the loss or its gradients are')
        for parameter in parameters:
            parameter.grad = None

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.judge_rest(runner)
        self.batch, self.losses, self.buffers = None, [], []

    def judge_rest(self, runner: Runner) -> None:
        if self.judged:
            return
        # Gradients are being accumulated, or the loss scaler has found some that are not finite.
        if not self.finite(self.all_losses()):
            self.refuse('the loss is')
            runner.optim_wrapper.zero_grad()
        elif hasattr(runner.optim_wrapper, 'loss_scaler') and runner.optim_wrapper.should_update():
            self.unchanged += 1
            if self.unchanged >= LIMIT:
                self.refuse(f'for {LIMIT} iterations, the gradients are')

    @staticmethod
    def finite(tensors) -> bool:
        """Whether all numbers are, on all ranks; called by all of them."""
        wrong = torch.tensor(not all_finite(tensors), dtype=torch.int)
        if get_world_size() > 1:
            all_reduce(wrong, 'max')
        return not wrong.item()

    def refuse(self, what: str) -> None:
        """Raise, or count and restore what the forward pass has changed; called by all ranks."""
        runner = self.runner()
        number = runner.iter + 1
        terms, files, where = self.culprits()
        runner.logger.error(f'iteration {number}: {terms}; its batch: {", ".join(files)}{where}')
        shown = ', '.join(files[:4]) + (f' and {len(files) - 4} more' if len(files) > 4 else '')
        images = f'images {shown or "unknown"}{where}'
        hub = runner.message_hub
        if self.action == 'skip':
            hub.update_info('skipped', hub.runtime_info.get('skipped', 0) + 1)
            runner.logger.warning(
                f'iteration {number}: {what} not finite ({terms}), so this update is skipped; '
                f'{hub.get_info("skipped")} so far; {images}'
            )
            with torch.no_grad():
                for buffer, before in self.buffers:
                    buffer.copy_(before)
            return
        last = hub.runtime_info.get('last_ckpt')
        kept = f'the last good checkpoint is {last}' if last else 'there is no checkpoint yet'
        raise FastViTError(
            f'iteration {number}: {what} not finite ({terms}); the weights were not updated, and '
            f'{kept}; {images}: look at them, lower the learning rate, clip the '
            'gradients (optim_wrapper.clip_grad), or leave out such updates with --nonfinite skip'
        )

    def culprits(self) -> tuple[str, list[str], str]:
        """The terms of a loss, images, and the ranks that these are of, with words around.

        Only a loss can say whose batch it was: gradients are those of all ranks.
        """
        bad = [part for part in self.losses if not all_finite(each(part.values()))]
        part = (bad or self.losses or [{}])[0]
        terms = ', '.join(
            f'{name} {float(sum(t.float().mean() for t in values)):.4g}'
            for name, values in part.items()
        )
        told = all_gather_object((get_rank(), bool(bad), terms, files_of(self.batch)))
        ranks, _, terms, files = zip(*([one for one in told if one[1]] or told), strict=True)
        where = f' (of rank {", ".join(map(str, ranks))})' if get_world_size() > 1 else ''
        return terms[0], [*chain(*files)], where


def each(values) -> Iterator[Tensor]:
    """The tensors in losses, of which some are lists."""
    for value in values:
        yield from value if isinstance(value, list | tuple) else [value]


def files_of(batch) -> list[str]:
    """The images of a batch, as far as it names them."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    paths = [getattr(sample, 'img_path', None) for sample in samples or []]
    return [str(path) for path in paths if path]
