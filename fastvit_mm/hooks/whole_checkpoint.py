"""OpenMMLab hook: checkpoints that hold the whole run, and are written completely or not at all."""

from collections import deque
from contextlib import suppress
from pathlib import Path

from mmengine.dist import all_gather_object, get_rank, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner

from fastvit_mm.errors import FastViTError, one_line
from fastvit_mm.running.batches import follow, seed_batches
from fastvit_mm.running.randomness import random_states, set_random_states
from fastvit_mm.writing import PART, whole

from .reparameterize import one_outcome

STATE = 'resuming'  # what a checkpoint's ``meta`` holds besides mmengine's


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, with checkpoints that survive every end of a run, and from which
    a resumed run ends with the weights of one that was never stopped.

    - A checkpoint is written beside and renamed when it is on the disk. Older ones, and the best
      so far, are removed after that.
    - It holds the states of the random generators of all ranks. The batches depend on the seed
      and the iteration (:mod:`fastvit_mm.running.batches`), so nothing has to be loaded again.
    - A validation that was due when the run ended is made up for. Validations leave the random
      generators as they were.
    - :meth:`save_now` writes one between any two iterations.

    Takes the arguments of CheckpointHook. Checkpoints for a remote ``out_dir`` are written by its
    own backend.

    Raises:
        FastViTError: a checkpoint cannot be written.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.resumed = self.during_validation = self.saved = None
        self.began = 0  # the current epoch, after this iteration

    def before_train(self, runner: Runner) -> None:
        local = '://' not in str(self.out_dir or runner.work_dir)
        if local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend='whole')
        super().before_train(runner)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids = deque(self.keep_ckpt_ids)  # longer for a moment
        if local:
            with one_outcome():
                self.make_folder(runner)
        self.during_validation = None  # a validation that failed has left it
        state, self.resumed = self.resumed or {}, None
        done = into_epoch(runner.train_loop, state) if state else 0
        self.continue_batches(runner, state, done)
        if state:
            self.continue_generators(runner, state['generators'])
            if not done and self.lacks_validation(runner):
                runner.val_loop.run()

    def make_folder(self, runner: Runner) -> None:
        """Now, so that one which vanishes later is not made again."""
        if not is_main_process():
            return
        try:
            Path(self.out_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FastViTError(
                f'cannot make the folder for checkpoints, {self.out_dir} ({one_line(error)}): '
                'choose another (default_hooks.checkpoint.out_dir)'
            ) from error
        clean(self.out_dir, runner.work_dir)

    def continue_batches(self, runner: Runner, state: dict, done: int) -> None:
        """Make the batches continue where the run stands, ``done`` batches into the epoch."""
        loop = runner.train_loop
        batches = loop.dataloader.batch_sampler
        sampler = getattr(batches, 'sampler', None)
        if state.get('sampler_seed') is not None and hasattr(sampler, 'seed'):
            sampler.seed = state['sampler_seed']  # drawn anew if the config gives none
        if done and state['epoch_length'] != len(loop.dataloader):
            runner.logger.warning(
                'the data set or the batches have changed since the checkpoint was written: '
                f'epoch {loop.epoch + 1} begins again'
            )
            done = 0
        self.began = loop.iter - done
        follow(loop, runner.seed, done)
        if runner.val_loop is not None:
            seed_batches(runner.val_loop.dataloader, runner.seed, lambda: (0, 0))

    @staticmethod
    def continue_generators(runner: Runner, states: list[dict]) -> None:
        if get_rank() < len(states):
            set_random_states(states[get_rank()])
        else:
            runner.logger.warning('more processes than before: random numbers will differ')

    def lacks_validation(self, runner: Runner) -> bool:
        """Whether a run resumed between two epochs, or two iterations of a loop without epochs,
        ended before the validation due there."""
        loop = runner.train_loop
        if runner.val_loop is None:
            return False
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        loop._decide_current_val_interval()
        done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
        return due and runner.message_hub.runtime_info.get('last_validation') != loop.iter

    def after_train_epoch(self, runner: Runner) -> None:
        self.began = runner.iter
        super().after_train_epoch(runner)

    def state(self, runner: Runner, iteration: int) -> dict:
        """What a checkpoint after ``iteration`` holds for resuming; called by all ranks."""
        loader = runner.train_loop.dataloader
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        sampler = getattr(loader.batch_sampler, 'sampler', None)
        return dict(
            generators=all_gather_object(self.during_validation or random_states()),
            sampler_seed=getattr(sampler, 'seed', None),
            epoch_length=len(loader),
            into_epoch=iteration - self.began if by_epoch else 0,
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and (state := checkpoint['meta'].get(STATE)):
            parts = ('generators', 'sampler_seed', 'epoch_length')
            self.resumed = {part: state[part] for part in parts}
            self.resumed['into_epoch'] = state.get('into_epoch')

    def before_val(self, runner: Runner) -> None:
        self.during_validation = random_states()

    def after_val(self, runner: Runner) -> None:
        states, self.during_validation = self.during_validation, None
        set_random_states(states)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        runner.message_hub.update_info('last_validation', runner.iter)
        super().after_val_epoch(runner, metrics)

    def save_now(self, runner: Runner, epoch: int, iteration: int) -> str:
        """Write a checkpoint after ``iteration``, within an epoch if need be; gives its path.

        Args:
            epoch: complete epochs.
            iteration: complete iterations.
        """
        if self.saved != (epoch, iteration):
            meta = dict(epoch=epoch, iter=iteration)
            if self.by_epoch:
                # The next one after an epoch replaces it.
                name = f'iter_{iteration}.pth'
                before = runner.message_hub.runtime_info.get('interrupted')
                runner.message_hub.update_info('interrupted', name)
                self.write(runner, name, meta)
                if before and before != name:
                    self.remove(before)
            else:
                self._save_checkpoint_with_step(runner, iteration, meta)
        return self.last_ckpt

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        limited = self.max_keep_ckpts > 0
        if limited:
            if step not in self.keep_ckpt_ids:
                self.keep_ckpt_ids.append(step)
            # The new checkpoint still names the oldest: a resumed run will remove it.
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.write(runner, self.filename_tmpl.format(step), meta)
        while limited and len(self.keep_ckpt_ids) > self.max_keep_ckpts:
            self.remove(self.filename_tmpl.format(self.keep_ckpt_ids.popleft()))
        if interrupted := runner.message_hub.runtime_info.get('interrupted'):
            self.remove(interrupted)
            runner.message_hub.update_info('interrupted', None)

    def write(self, runner: Runner, name: str, meta: dict) -> None:
        """Write a checkpoint, then its name to ``last_checkpoint``."""
        before, self.last_ckpt = self.last_ckpt, self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        meta = dict(meta, **{STATE: self.state(runner, meta['iter'])})
        try:
            with one_outcome():
                runner.save_checkpoint(
                    self.out_dir,
                    name,
                    self.file_client_args,
                    save_optimizer=self.save_optimizer,
                    save_param_scheduler=self.save_param_scheduler,
                    meta=meta,
                    by_epoch=self.by_epoch,
                    backend_args=self.backend_args,
                    **self.args,
                )
                if is_main_process():
                    with whole(Path(runner.work_dir, 'last_checkpoint')) as part:
                        part.write_text(self.last_ckpt)
        except OSError as error:
            raise FastViTError(not_written(self.last_ckpt, before, error)) from error
        self.saved = meta['epoch'], meta['iter']

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        one = len(self.key_indicators) == 1 if self.save_best else True
        # Without a path, mmengine removes nothing.
        if one:
            before, self.best_ckpt_path = [getattr(self, 'best_ckpt_path', None)], None
        else:
            before = list(self.best_ckpt_path_dict.values())
            kept = dict(self.best_ckpt_path_dict)
            self.best_ckpt_path_dict = dict.fromkeys(kept)
        try:
            super()._save_best_checkpoint(runner, metrics)
        except OSError as error:
            raise FastViTError(not_written('the best checkpoint', self.last_ckpt, error)) from error
        if one:
            self.best_ckpt_path = self.best_ckpt_path or before[0]
            now = [self.best_ckpt_path]
        else:
            new = self.best_ckpt_path_dict.items()
            self.best_ckpt_path_dict = {key: path or kept[key] for key, path in new}
            now = self.best_ckpt_path_dict.values()
        for path in set(before) - set(now) - {None}:
            self.remove(path)

    def remove(self, path: str) -> None:
        path = self.file_backend.join_path(self.out_dir, path)
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)


def into_epoch(loop: BaseLoop, state: dict) -> int:
    """How many batches of the current epoch a resumed run has already trained."""
    if not isinstance(loop, EpochBasedTrainLoop):
        return 0
    if state['into_epoch'] is not None:
        return state['into_epoch']
    # a checkpoint of an earlier version: right if all epochs were as long as the last
    done = loop.iter - loop.epoch * state['epoch_length']
    return done if 0 <= done <= state['epoch_length'] else 0


def clean(*folders: str) -> None:
    """Remove what a killed process had not finished to write."""
    for folder in folders:
        for part in Path(folder).glob(PART):
            with suppress(OSError):
                part.unlink()


def not_written(path: str, before: str | None, error: OSError) -> str:
    kept = f'{before} is whole: ' if before and Path(before).is_file() else ''
    return (
        f'cannot write {path} ({one_line(error)}): {kept}make room or choose another disk, '
        'then repeat the command with --resume'
    )
