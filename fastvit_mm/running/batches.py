"""A training run's batches: the same in a resumed run, for any number of data workers.

The images of a batch, and what is drawn at random while they are read, depend only on the run's
seed and on the iteration: a run that is resumed continues with what it would have read, loads
nothing twice, and needs no state of its data workers.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from fastvit_mm.errors import FastViTError

from .randomness import random_states, seed_generators, set_random_states

#: In a data worker: its process id and the item it is reading, in memory shared with the trainer.
note: torch.Tensor | None = None


@dataclass
class SeededBatch:
    """The indices of a batch; while an item is read, the random generators are seeded for it."""

    indices: list
    seed: tuple[int, int]  # of the run, and the number of the batch
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator:
        outer = random_states(gpus=False)  # without data workers they are those of the training
        try:
            for place, index in enumerate(self.indices):
                take_note(index)
                # the same as in one process with a batch as large as those of all ranks
                seed_generators(*self.seed, place * self.world_size + self.rank)
                yield index
        finally:
            take_note(-1)
            set_random_states(outer)

    def __len__(self) -> int:
        return len(self.indices)


def take_note(index) -> None:
    if note is not None and isinstance(index, int):
        note[1] = index


class Batches:
    """A batch sampler whose batches are seeded, and which begins where a run stands.

    Args:
        batches: the batch sampler of a data loader.
        seed: of the run.
        place: called when iteration begins; gives the number of the first batch and how many
            batches of the sampler to leave out.
        workers: number of data workers.
    """

    def __init__(self, batches, seed: int, place: Callable[[], tuple[int, int]], workers: int):
        self.batches, self.seed, self.place = batches, seed, place
        self.notes = torch.full((workers, 2), -1).share_memory_()

    def __iter__(self) -> Iterator[SeededBatch]:
        first, left_out = self.place()
        if isinstance(self.sampler, InfiniteSampler):
            # It has one stream for all its iterators: begin it again.
            self.sampler.indices = self.sampler._indices_of_rank()
        for number, indices in enumerate(islice(self.batches, left_out, None), first):
            yield SeededBatch(list(indices), (self.seed, number), *get_dist_info())

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name):
        if name == 'batches':  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.batches, name)


def begin_worker(init: Callable | None, notes: torch.Tensor, worker_id: int) -> None:
    """What a data worker does first."""
    global note
    if init is not None:
        init(worker_id)
    note = notes[worker_id]
    note[0] = os.getpid()


def seed_batches(loader: DataLoader, seed: int, place: Callable[[], tuple[int, int]]) -> None:
    """Make a data loader's batches seeded ones (:class:`Batches`)."""
    if loader.batch_sampler is None:  # an IterableDataset has no indices
        return
    if isinstance(loader.batch_sampler, Batches):
        loader.batch_sampler.seed, loader.batch_sampler.place = seed, place
        return
    batches = Batches(loader.batch_sampler, seed, place, loader.num_workers)
    object.__setattr__(loader, 'batch_sampler', batches)
    loader.worker_init_fn = partial(begin_worker, loader.worker_init_fn, batches.notes)
    # Otherwise each iterator takes a number from the generator of the training.
    loader.generator = torch.Generator()
    # mmengine 0.10.7 starts the data workers before a run is resumed.
    loader._iterator = None


def follow(loop, seed: int, left_out: int = 0) -> None:
    """Make a training loop's batches continue where the loop stands.

    Args:
        loop: mmengine's loop over epochs or iterations.
        seed: of the run.
        left_out: batches of the current epoch that were trained before the run was stopped.
    """
    loader, remaining = loop.dataloader, [left_out]

    def in_epochs() -> tuple[int, int]:
        return loop.iter, remaining.pop() if remaining else 0

    def in_iterations() -> tuple[int, int]:
        sampler = loader.batch_sampler.sampler
        if isinstance(sampler, InfiniteSampler):
            return loop.iter, loop.iter
        epoch, done = divmod(loop.iter, len(loader))
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
        return loop.iter, done

    endless = isinstance(loop, IterBasedTrainLoop)
    seed_batches(loader, seed, in_iterations if endless else in_epochs)
    if endless and isinstance(loader.batch_sampler, Batches):
        loop.dataloader_iterator = Onward(loop)


class Onward:
    """Batches without end for mmengine's loop over iterations. Those that a resumed loop asks for
    in order to skip them are not loaded: the sampler leaves them out."""

    def __init__(self, loop: IterBasedTrainLoop):
        skips = hasattr(loop.dataloader_iterator, 'skip_iter')
        self.loader, self.iterator = loop.dataloader, None
        self.skipped = 0 if skips else loop.iter  # mmengine 0.10.7 takes one after the other

    def skip_iter(self, number: int) -> None:
        pass

    def __iter__(self):
        return self

    def __next__(self):
        if self.skipped:
            self.skipped -= 1
            return None
        if self.iterator is None:
            self.iterator = iter(self.loader)
        try:
            return next(self.iterator)
        except StopIteration:
            self.iterator = iter(self.loader)
            return next(self.iterator)


KINDS = ('train', 'val', 'test')
DIED = re.compile(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)')


@contextmanager
def says_if_worker_dies(runner: Runner) -> Iterator[None]:
    """Turn the death of a data worker into one line.

    Raises:
        FastViTError: a data worker died; says what it was reading, as far as is known.
    """
    try:
        yield
    except RuntimeError as error:
        if not DIED.search(str(error)):
            raise
        if hasattr(signal, 'SIGCHLD') and threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise it once more, wherever this process is then
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        loops = {f'{kind}_dataloader': getattr(runner, f'_{kind}_loop') for kind in KINDS}
        loaders = {k: loop.dataloader for k, loop in loops.items() if isinstance(loop, BaseLoop)}
        raise death_of_worker(error, loaders) from error


def death_of_worker(error: RuntimeError, loaders: dict[str, DataLoader]) -> FastViTError:
    """What to say of a data worker's death, with the file that it was reading.

    Args:
        loaders: by their names in the config.
    """
    found = DIED.search(str(error))
    pids = {int(pid) for pid in found[1].split(',')}
    known = {
        name: [index for pid, index in loader.batch_sampler.notes.tolist() if pid in pids]
        for name, loader in loaders.items()
        if isinstance(loader.batch_sampler, Batches)
    }
    known = {name: places for name, places in known.items() if places}
    files = [
        file_of(loaders[n].dataset, i) for n, places in known.items() for i in places if i >= 0
    ]
    why = DIED.search(str(error.__cause__)) or found  # with the signal
    reading = f' while reading {", ".join(files)}' if files else ' between two images' * bool(known)
    numbers = ' or '.join(f'{name}.num_workers' for name in known or loaders)
    return FastViTError(
        f'a data worker died{reading} ({why[2].partition(".")[0]}): if it was killed, memory may '
        f'have run out (set a smaller {numbers}); if not, look at the file'
    )


def file_of(dataset, index: int) -> str:
    """The image that a data set reads for an index, or the index if it does not say."""
    try:
        return str(dataset.get_data_info(index)['img_path'])
    except (AttributeError, KeyError, TypeError):
        return f'image {index}'
