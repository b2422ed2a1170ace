"""Losses, learning rate and metrics of training runs, read from their logs, and their picture."""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from fastvit_mm.errors import FastViTError

Curves = dict[str, list[tuple[int, float]]]  # values over iterations, by name
SMOOTH = 60  # points: longer curves are smoothed over a twentieth of their length
NOT_METRICS = ('time', 'data_time', 'step', 'iter', 'epoch', 'memory')


def find_logs(work_dir: Path) -> list[Path]:
    """mmengine's scalars of all time stamps, in order; also from one time stamp's folder."""
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    logs += work_dir.glob('vis_data/scalars.json')
    if not logs:
        raise FastViTError(
            f'no training log in {work_dir}: a work dir has TIME/vis_data/scalars.json'
        )
    return logs


def read(path: Path) -> Iterator[dict]:
    """The lines of a log; an incomplete one of a killed run is reported and skipped."""
    bad = 0
    with path.open(encoding='utf-8', errors='replace') as lines:
        for line in filter(str.strip, lines):
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError):
                bad += 1
    if bad:
        print(f'{path}: {bad} unreadable line{"s"[: bad > 1]} skipped', file=sys.stderr)


def curves(work_dir: Path) -> Curves:
    """Everything that a work dir's runs logged. If two overlap, the later one counts.

    Raises:
        FastViTError: there is no log, or nothing in it.
    """
    logs = [list(read(path)) for path in find_logs(work_dir)]
    trained = [line for log in logs for line in log if 'iter' in line]
    # Validations of runs counted in epochs are logged with the epoch as their step.
    epochs = (math.ceil(line['iter'] / line['epoch']) for line in trained if line.get('epoch'))
    per_epoch = max(epochs, default=1)
    joined = defaultdict(list)
    for log in logs:
        new, step = defaultdict(list), 0
        for line in log:
            training = 'iter' in line
            step = line['iter'] if training else max(step, line.get('step', 0) * per_epoch)
            for name, value in line.items():
                wanted = name == 'lr' or 'loss' in name if training else name not in NOT_METRICS
                if wanted and isinstance(value, int | float):
                    new[name].append((step, value))
        begin = min((points[0][0] for points in new.values()), default=math.inf)
        for name in dict.fromkeys((*joined, *new)):
            joined[name] = [one for one in joined[name] if one[0] < begin] + new[name]
    # COCO gives -1 if there is nothing to measure.
    found = {n: p for n, p in joined.items() if p and any(value != -1 for _, value in p)}
    if not found:
        raise FastViTError(f'the logs in {work_dir} contain nothing yet: train for longer')
    return found


def panels(runs: dict[str, Curves]) -> list[str]:
    """The names to plot: loss, its parts, learning rate, metrics."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    parts = [name for name in names if 'loss' in name and name != 'loss']
    if len(parts) == 1 and 'loss' in names:  # the same as the loss
        names.remove(parts.pop())
    rank = {'loss': 0, 'lr': 2}
    return sorted(names, key=lambda name: rank.get(name, 1 if name in parts else 3))


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of a twentieth of the curve around each point, of fewer points at its ends."""
    window = np.ones(max(3, len(values) // 20))
    return np.convolve(values, window, 'same') / np.convolve(np.ones_like(values), window, 'same')


def style(index: int) -> dict:
    """The line of a run."""
    return dict(color=f'C{index % 10}', linestyle=('-', '--', ':')[index // 10 % 3])


def draw(axis: Axes, name: str, runs: dict[str, Curves]) -> None:
    """One quantity, for all runs that have it."""
    metric = name != 'lr' and 'loss' not in name
    for index, run in enumerate(runs.values()):
        if name not in run:
            continue
        steps, values = np.array(run[name], float).T
        last, marker = values[-1], 'o' if metric and len(steps) < 50 else None
        if name != 'lr' and len(steps) > SMOOTH:
            axis.plot(steps, values, alpha=0.3, linewidth=0.8, **style(index))
            values = smooth(values)
        axis.plot(steps, values, marker=marker, markersize=3.5, clip_on=False, **style(index))
    percent = metric and 1 < axis.dataLim.ymax <= 100
    if percent:
        axis.set_ylim(top=min(axis.get_ylim()[1], 100))
    title = 'learning rate' if name == 'lr' else f'{name} (%)' if percent else name
    axis.set_title(title, loc='left', fontsize=10)
    if len(runs) == 1:
        axis.set_title(f'last {last:.4g}', loc='right', fontsize=9, color='gray')
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlim(0, max(points[-1][0] for run in runs.values() for points in run.values()))
    axis.xaxis.set_major_formatter(EngFormatter(sep=''))


def plot(runs: dict[str, Curves], path: Path) -> None:
    """One panel for each quantity, one colour for each run."""
    names = panels(runs)
    columns = min(len(names), 3 if len(names) <= 9 else 4)
    rows = math.ceil(len(names) / columns)
    figure = Figure((4 * columns, 2.6 * rows + 0.5), dpi=110, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        draw(axis, name, runs)
    for axis in axes[len(names) - columns : len(names)]:
        axis.set_xlabel('iterations')
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    else:
        lines = [Line2D([], [], **style(index)) for index in range(len(runs))]
        figure.legend(lines, list(runs), loc='outside upper center', ncols=columns, frameon=False)
    figure.savefig(path)


def run_names(work_dirs: list[Path]) -> list[str]:
    """The folders' names, or their full paths if two names are equal."""
    names = [folder.resolve().name for folder in work_dirs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in work_dirs]
