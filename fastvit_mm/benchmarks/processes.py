"""processes: images per second of training in several processes against a single one.

All have --threads threads (1). A step is a forward and a backward pass of the backbone on each
process's own batch, the exchange of gradients, and the optimizer's update.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn

from fastvit_mm import ARCHS
from fastvit_mm.running.processes import CPUDataParallel

from . import measure, sides, train
from .report import Report

HELP = 'training in several processes against a single one'


def add_arguments(parser) -> None:
    parser.add_argument('--archs', nargs='+', default=['t8'], choices=ARCHS)
    parser.add_argument('--sizes', nargs='+', type=int, default=[256])
    parser.add_argument('--batch', nargs='+', type=int, default=[8], help='of each process')
    parser.add_argument('--processes', type=int, default=2)
    parser.set_defaults(threads=1, seconds=60)


def updates(model: nn.Module, inputs: torch.Tensor) -> Callable:
    """A call that trains ``model`` for one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def call():
        train.step(model, inputs)
        optimizer.step()

    return call


def one_rank(rank: int, case: dict, folder: str) -> None:
    """Measure in turns: rank 0 alone while the others wait, then all together."""
    torch.set_num_threads(case['threads'])
    place, count = f'file://{folder}/rendezvous', case['processes']
    dist.init_process_group('gloo', init_method=place, rank=rank, world_size=count)
    model = sides.backbones(case['arch'])[0].train()
    inputs = sides.images(case['size'], case['batch'], seed=rank)
    alone = updates(copy.deepcopy(model), inputs)
    together = updates(CPUDataParallel(model, broadcast_buffers=False), inputs)

    def among(call: Callable) -> float:
        dist.barrier()
        return measure.timed(lambda: (call(), dist.barrier()))

    def turn() -> list[float]:
        return [among(alone if rank == 0 else lambda: None), among(together)]

    turn()
    turns = torch.tensor(case['seconds'] / sum(turn()))
    dist.broadcast(turns, 0)
    number = int(turns.clamp(measure.MIN_TURNS, measure.MAX_TURNS))
    times = [turn() for _ in range(number)]
    if rank == 0:
        Path(folder, 'times.json').write_text(json.dumps(times))
    dist.destroy_process_group()


def times_of(case: dict) -> np.ndarray:
    """Seconds of a step alone and of one together, (turns, 2)."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(one_rank, (case, folder), nprocs=case['processes'], start_method='spawn')
        return np.array(json.loads(Path(folder, 'times.json').read_text()))


def run(args, report: Report) -> None:
    title = f'images/s of {args.processes} processes / images/s of one'
    ratios = {}
    for arch in args.archs:
        for size, batch in sides.shapes(args.sizes, args.batch):
            case = dict(arch=arch, size=size, batch=batch)
            settings = {name: getattr(args, name) for name in ('threads', 'processes', 'seconds')}
            alone, together = times_of({**case, **settings}).T
            ratio = measure.ratio(args.processes * alone, together)
            row = {
                '1 process, images/s': measure.Spread.of(batch / alone),
                f'{args.processes} processes, images/s': measure.Spread.of(
                    args.processes * batch / together
                ),
            }
            report.add(title, {**case, **row, 'ratio': ratio, 'turns': len(alone)})
            ratios[f'{arch} {size} x{batch}'] = ratio
    report.conclude(title, ratios)
