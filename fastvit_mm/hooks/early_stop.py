"""OpenMMLab hook: early stopping that a resumed run goes on with."""

from mmengine.hooks import EarlyStoppingHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

KEY = 'early_stop'  # in the message hub, which checkpoints hold


@HOOKS.register_module()
class EarlyStopHook(EarlyStoppingHook):
    """mmengine's EarlyStoppingHook, whose best score and number of validations without a better one
    outlast an interruption: a run that it has ended does not train on when it is resumed.

    Takes the arguments of EarlyStoppingHook.
    """

    def before_train(self, runner: Runner) -> None:
        self.recall(runner)
        if self.wait_count >= self.patience and not runner.train_loop.stop_training:
            runner.train_loop.stop_training = True
            runner.logger.info(
                f'this run has ended after {self.wait_count} validations that did not improve '
                f'{self.monitor}, {self.best_score:.4g} at best'
            )

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        self.recall(runner)  # the checkpoint hook makes up for a validation before `before_train`
        super().after_val_epoch(runner, metrics)
        state = dict(best_score=float(self.best_score), wait_count=self.wait_count)
        runner.message_hub.update_info(KEY, state)

    def recall(self, runner: Runner) -> None:
        vars(self).update(runner.message_hub.runtime_info.get(KEY, {}))
