"""OpenMMLab hook: what a run shows while it works."""

import atexit
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from numbers import Number
from pathlib import Path

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from fastvit_mm import noise

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGE = str(Path(__file__).parents[1])
WINDOW = 10  # iterations that losses and times are averaged over, as in mmengine's log
PATIENCE = 60  # seconds without a line, where there is no bar
REDRAW = 0.2  # seconds


class ScreenHandler(logging.StreamHandler):
    """Takes the place of a logger's handler for standard output.

    Until the run begins, it shows warnings and what this package says: configuration and
    environment are in the log file. In a terminal, a bar replaces what mmengine's LoggerHook logs
    after iterations; elsewhere these lines appear with images per second and memory.
    """

    def __init__(self, former: logging.Handler):
        super().__init__(sys.stdout)  # mmengine's MLflow backend asks a handler for its stream
        self.setLevel(former.level)
        self.filters = former.filters
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.preparing, self.bar = True, None
        self.facts = {}  # about the last iteration of train, val and test
        self.held = ''  # the last line that the bar replaced
        self.spoken = None  # when the last line about an iteration appeared

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage().strip()
            if record.exc_info:
                text += f'\n{logging.Formatter().formatException(record.exc_info)}'
            self.show(record, text)
        except Exception:
            self.handleError(record)

    def show(self, record: logging.LogRecord, text: str) -> None:
        by_hook = record.module == 'logger_hook'
        if noise.known(text) or (by_hook and text.startswith('Exp name: ')):
            return
        if record.levelno >= logging.WARNING:
            style = 'red' if record.levelno >= logging.ERROR else 'yellow'
            self.console.print(f'{record.levelname.lower()}: {text}', style=style)
        elif by_hook and record.funcName.endswith('_iter'):
            if self.bar is None:
                self.say(text, record.funcName.split('_')[1])
            elif record.funcName == 'after_train_iter':
                self.held = text
        elif not self.preparing or record.pathname.startswith(PACKAGE):
            self.console.print(text)

    def say(self, text: str, mode: str) -> None:
        """Show a line about an iteration of train, val or test."""
        facts = self.facts.get(mode, '')
        if 'memory: ' in text:
            facts = facts.partition('memory: ')[0]
        self.console.print(f'{text}  {facts}'.rstrip())
        self.spoken = time.monotonic()

    def release(self) -> None:
        """Show the last line about training, which would be lost with the bar."""
        if self.held:
            self.console.print(self.held)
        self.held = ''


def take_over(logger: MMLogger, introduce: bool = False) -> ScreenHandler | None:
    """Let ``logger`` show its messages through a :class:`ScreenHandler`; None if everything is to
    be shown as mmengine does. It can introduce itself by naming the log file."""
    for place, former in enumerate(logger.handlers):
        if isinstance(former, ScreenHandler):
            return former
        if type(former) is logging.StreamHandler and not noise.everything:
            logger.handlers[place] = handler = ScreenHandler(former)
            if introduce and handler.level <= logging.INFO and logger.log_file:
                handler.console.print(f'configuration and environment: {logger.log_file}')
            return handler
    return None


drawn: list[Progress] = []  # at most one


def new_bar(console: Console) -> Progress:
    """A bar of one line: what others write to the terminal then spoils nothing.

    It is drawn by this thread alone: a lock held by another would stay locked in the data workers,
    which are forked meanwhile.
    """
    texts = dict(markup=False, table_column=Column(no_wrap=True))
    losses = Column(ratio=1, no_wrap=True, overflow='ellipsis')
    bar = Progress(
        TextColumn('{task.description}', **texts),
        BarColumn(16 if console.width >= 100 else 8),
        MofNCompleteColumn(),
        TextColumn('{task.fields[losses]}', markup=False, table_column=losses),
        TextColumn('{task.fields[facts]}', **texts),
        console=console,
        auto_refresh=False,
        redirect_stderr=sys.stderr.isatty(),
        expand=True,
    )
    bar.add_task('', total=None, losses='', facts='')
    bar.start()
    console.show_cursor()  # a killed process could not give it back
    return bar


def close() -> None:
    """End the bar, so that what comes next stands below it."""
    while drawn:
        drawn.pop().stop()


@contextmanager
def closing() -> Iterator[None]:
    """No bar outlives this."""
    try:
        yield
    finally:
        close()


atexit.register(close)


@HOOKS.register_module()
class ScreenHook(Hook):
    """Show how far a run is: in a terminal by a bar with losses, metric, images per second, memory
    and time left; elsewhere by lines, the first of which appears after the first iteration.

    Images per second are those of all ranks; memory is what PyTorch holds of the GPU or, without
    one, the most that the process has used. Only rank 0 shows anything. The log file and
    ``vis_data/`` are as without this hook. If ``log_level`` leaves out infos, so does the screen.
    """

    priority = 'LOWEST'  # losses and times are known

    def __init__(self):
        self.handler, self.metric, self.redrawn = None, '', 0.0

    def before_run(self, runner: Runner) -> None:
        self.handler = take_over(runner.logger)
        if self.handler is not None:
            self.handler.preparing = False
            if self.handler.level > logging.INFO:  # as on the other ranks
                self.handler = None

    def before_train(self, runner: Runner) -> None:
        self.begin(first_line=True)

    before_test = before_train

    def before_val(self, runner: Runner) -> None:
        self.begin(first_line=False)

    def begin(self, first_line: bool) -> None:
        """Of training, or of a test; whether its first iteration gets a line in any case."""
        if self.handler is None:
            return
        self.redrawn = 0.0
        if first_line:
            self.handler.spoken = None
        self.handler.release()
        console = self.handler.console
        if not drawn and console.is_interactive and sys.stdout.isatty():
            drawn.append(new_bar(console))
        self.handler.bar = drawn[0] if drawn else None

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        savers = [h for h in runner.hooks if isinstance(h, CheckpointHook) and h.save_best]
        numbers = {k: v for k, v in (metrics or {}).items() if isinstance(v, Number)}
        names = [n for h in savers for n in h.key_indicators if n in numbers]
        for name in names or list(numbers)[:1]:
            self.metric = f'{name.split("/")[-1]} {numbers[name]:.4g}'

    def after_run(self, runner: Runner) -> None:
        self.restore()

    def restore(self, runner: Runner | None = None) -> None:
        """End the bar."""
        close()
        if self.handler is not None:
            self.handler.bar = None
            self.handler.release()

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None, mode='train'
    ) -> None:
        if self.handler is None:
            return
        now = time.monotonic()
        images = number_of_images(data_batch, outputs if mode != 'train' else None)
        rate = images_per_second(runner.message_hub, mode, images * get_world_size())
        self.handler.facts[mode] = f'{rate}memory: {memory()}'
        if self.handler.bar is not None:
            if now - self.redrawn > REDRAW or is_last(runner, batch_idx, mode):
                self.redrawn = now
                self.draw(runner, batch_idx, mode)
        elif self.handler.spoken is None or now - self.handler.spoken > PATIENCE:
            parts = [title(runner, mode, batch_idx), f'eta: {time_left(runner)}']
            parts += [f'{name}: {value:.4f}' for name, value in losses(runner.message_hub, mode)]
            self.handler.say('  '.join(parts), mode)

    def draw(self, runner: Runner, batch_idx: int, mode: str) -> None:
        training = mode == 'train'
        shown = [f'{name} {value:.4g}' for name, value in losses(runner.message_hub, mode)]
        shown[1:1] = [self.metric] if self.metric and training else []
        facts = self.handler.facts[mode].replace('images/s', 'img/s').replace('memory: ', '')
        self.handler.bar.update(
            self.handler.bar.task_ids[0],
            description=title(runner, mode),
            completed=runner.iter + 1 if training else batch_idx + 1,
            total=runner.max_iters if training else len(loader_of(runner, mode)),
            losses='  '.join(shown),
            facts=f'{facts}  {time_left(runner)}',
        )
        self.handler.bar.refresh()


def loader_of(runner: Runner, mode: str):
    return getattr(runner, f'{mode}_dataloader')


def is_last(runner: Runner, batch_idx: int, mode: str) -> bool:
    if mode == 'train':
        return runner.iter + 1 == runner.max_iters
    return batch_idx + 1 == len(loader_of(runner, mode))


def title(runner: Runner, mode: str, batch_idx: int | None = None) -> str:
    """What is being done; with ``batch_idx`` how mmengine's log would put it."""
    by_epoch, training = runner.log_processor.by_epoch, mode == 'train'
    if batch_idx is None:
        return f'epoch {runner.epoch + 1}/{runner.max_epochs}' if by_epoch and training else mode
    done, total = batch_idx + 1, len(loader_of(runner, mode))
    if training and not by_epoch:
        done, total = runner.iter + 1, runner.max_iters
    epoch = f'[{runner.epoch + 1}]' if by_epoch and training else ''
    head = f'{"Epoch" if by_epoch else "Iter"}({mode}) {epoch}'
    return f'{head}[{done:>{len(str(total))}}/{total}]'


def time_left(runner: Runner) -> timedelta:
    """Of training or, during a test, of the test, as mmengine's IterTimerHook estimates it."""
    return timedelta(seconds=int(runner.message_hub.runtime_info.get('eta', 0)))


def losses(hub: MessageHub, mode: str) -> list[tuple[str, float]]:
    """The means of every loss over the last iterations."""
    names = [name for name in hub.log_scalars if name.startswith(f'{mode}/') and 'loss' in name]
    return [(n.partition('/')[2], float(hub.log_scalars[n].mean(WINDOW))) for n in names]


def images_per_second(hub: MessageHub, mode: str, images: int) -> str:
    seconds = hub.log_scalars.get(f'{mode}/time')
    if seconds is None or not images:
        return ''
    return f'{images / max(seconds.mean(WINDOW), 1e-9):.1f} images/s  '


def memory() -> str:
    """What this process has taken of the GPU or, without one, the most it has used."""
    if torch.cuda.is_available():
        taken = torch.cuda.memory_reserved()
    elif resource is not None:
        unit = 1 if sys.platform == 'darwin' else 1024
        taken = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    else:
        return '?'
    return f'{taken / 1e9:.1f} GB'


def number_of_images(batch, predictions=None) -> int:
    """In a batch of any OpenMMLab package, or in what was predicted for it, which counts images
    that were augmented several times once; 0 if it is something else."""
    found = batch.get('inputs') if isinstance(batch, dict) else None
    found = found if predictions is None else predictions
    return len(found) if hasattr(found, '__len__') else 0
