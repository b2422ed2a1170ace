"""OpenMMLab hook: Ctrl-C and SIGTERM end a training after the step, with a checkpoint."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from weakref import WeakSet

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner

from fastvit_mm.writing import whole

from .screen import close
from .sync_statistics import SyncStatisticsHook
from .whole_checkpoint import WholeCheckpointHook

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@HOOKS.register_module()
class StopOnSignalHook(Hook):
    """On SIGINT (Ctrl-C) or SIGTERM (Slurm's or a cloud provider's warning), finish the step,
    write a checkpoint, say how to resume, and exit with the code of the signal, 130 or 143.

    A second signal ends the process immediately. All ranks stop after the same iteration,
    whichever received the signal. With gradient accumulation, they stop after the next update;
    during a validation, a single process stops before its next batch, several stop after it.
    """

    priority = 'LOWEST'  # everything that belongs to the step is done

    def __init__(self):
        self.received, self.process, self.previous = 0, None, {}
        self.outlasting = WeakSet()

    def before_run(self, runner: Runner) -> None:
        # Before training begins: a resumed run may have to validate first.
        loops = [o for o in (runner._train_loop, runner._val_loop) if isinstance(o, BaseLoop)]
        for loader in {loop.dataloader for loop in loops}.difference(self.outlasting):
            loader.worker_init_fn = partial(outlast, loader.worker_init_fn)
            self.outlasting.add(loader)

    def before_train(self, runner: Runner) -> None:
        self.received, self.process = 0, os.getpid()
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def after_run(self, runner: Runner) -> None:
        self.restore(runner)

    def restore(self, runner: Runner | None = None) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def receive(self, number: int, frame=None) -> None:
        if os.getpid() != self.process:  # a data worker or a metric's process, which inherited this
            if number == signal.SIGTERM:  # by which a pool ends its processes, and waits for that
                os._exit(128 + number)
            return
        if self.received:
            say('stopped at once')
            os._exit(128 + number)
        self.received = number
        say(f'{signal.Signals(number).name}: stopping after this step; again to stop at once')

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; called by all ranks."""
        if get_world_size() == 1:
            return self.received
        number = torch.tensor(self.received)
        all_reduce(number, 'max')
        return int(number)

    def after_train_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        number = self.agreed()
        updated = getattr(runner.optim_wrapper, 'should_update', lambda: True)()
        if number and updated:
            self.stop(runner, number, runner.epoch, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.received and get_world_size() == 1:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):  # the trained weights take their places again
                    hook.after_val_epoch(runner)
            self.stop(runner, self.received, runner.epoch, runner.iter)

    def after_val(self, runner: Runner) -> None:
        if self.process and (number := self.agreed()):
            self.stop(runner, number, runner.epoch, runner.iter)

    @staticmethod
    def stop(runner: Runner, number: int, epoch: int, iteration: int) -> None:
        for hook in runner.hooks:
            if isinstance(hook, SyncStatisticsHook):
                hook.average(runner)
        path = save(runner, epoch, iteration)
        if is_main_process():
            close()  # the last line says how to resume
            say(
                f'stopped by {signal.Signals(number).name} after iteration {iteration}, {path} is '
                'written: repeat the command with --resume to continue'
            )
        sys.exit(128 + number)


def save(runner: Runner, epoch: int, iteration: int) -> str:
    """Write a checkpoint after any iteration; gives its path."""
    for hook in runner.hooks:
        if isinstance(hook, WholeCheckpointHook):
            return hook.save_now(runner, epoch, iteration)
    name = f'iter_{iteration}.pth'
    runner.save_checkpoint(runner.work_dir, name, meta=dict(epoch=epoch, iter=iteration))
    path = Path(runner.work_dir, name)
    if is_main_process():
        with whole(Path(runner.work_dir, 'last_checkpoint')) as part:
            part.write_text(str(path))
    return str(path)


def say(text: str) -> None:
    """Write a line in a signal handler, where ``print`` may be in the middle of another."""
    os.write(2, f'\n{text}\n'.encode())


def outlast(init: Callable | None, worker_id: int) -> None:
    """What a data worker does first: signals that reach all processes are for the trainer, which
    still needs its batches."""
    if init is not None:
        init(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, 'sigwaitinfo'):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=await_trainer, args=(os.getppid(),), daemon=True).start()


def await_trainer(trainer: int) -> None:
    """End the process when the trainer says so; others send the same signal."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
