"""OpenMMLab hook: one set of BatchNorm statistics for all ranks."""

from mmengine.dist import all_reduce_params
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm


@HOOKS.register_module()
class SyncStatisticsHook(Hook):
    """Average the running statistics of every BatchNorm over all ranks: after each epoch of
    training, before each validation and before each checkpoint; with a single rank, do nothing.

    Every rank collects the statistics of its own images. Without this hook each validates with
    its own, and the checkpoint contains rank 0's. The statistics of an EMAHook's averaged model,
    which is validated and saved in place of the trained one, are averaged as well: mmengine's
    SyncBuffersHook skips them.
    """

    priority = 'LOW'  # after EMAHook, before CheckpointHook

    def average(self, runner: Runner) -> None:
        """All ranks call it at the same point of the run."""
        averaged = [h.ema_model for h in runner.hooks if isinstance(h, EMAHook)]
        modules = [m for model in (runner.model, *averaged) for m in model.modules()]
        norms = [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]
        all_reduce_params([s for n in norms for s in (n.running_mean, n.running_var)], op='mean')

    def after_train_epoch(self, runner: Runner) -> None:
        self.average(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        self.average(runner)  # loops that count iterations have no epochs

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        # Rank 0 saves alone: in before_save_checkpoint, it would wait for the others for ever.
        if any(self.saves(runner, h) for h in runner.hooks if isinstance(h, CheckpointHook)):
            self.average(runner)

    @staticmethod
    def saves(runner: Runner, hook: CheckpointHook) -> bool:
        """Whether ``hook`` saves a checkpoint after this iteration."""
        due = hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
        last = hook.save_last and hook.is_last_train_iter(runner)
        return not hook.by_epoch and (due or last)
