"""Measurements as Markdown tables, JSON and pictures.

A row is a dict from column to value; the column's name includes the unit. Units: ms, MB (2**20
bytes), GFLOP/s (10**9, two per multiply-add).
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch

from fastvit_mm.errors import FastViTError

from .measure import Spread, best_gflops, geometric_mean

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

PLAIN = FuncFormatter(lambda value, _: f'{value:g}')


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if not value or not np.isfinite(value):
        return f'{value:g}'
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f'{value:,.{digits}f}'


def text(value) -> str:
    """A cell: a spread as ``median (low-high)``, None as a dash."""
    if value is None:
        return '-'
    if isinstance(value, Spread):
        return f'{number(value.median)} ({number(value.low)}-{number(value.high)})'
    return number(value) if isinstance(value, float) else str(value)


def markdown(rows: list[dict]) -> str:
    """A table; columns with the same value in all rows are listed in one line before it."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    constant = []
    if len(rows) > 1:
        constant = [c for c in columns[1:] if len({text(row.get(c)) for row in rows}) == 1]
    columns = [c for c in columns if c not in constant]
    before = ', '.join(f'{c}: {text(rows[0].get(c))}' for c in constant)
    lines = [columns, ['---'] * len(columns)]
    lines += [[text(row.get(column)) for column in columns] for row in rows]
    table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    return f'In all rows: {before}.\n\n{table}' if before else table


@dataclass
class Report:
    """Collects the measurements of one command.

    Attributes:
        panels: each draws one panel of the picture on axes.
    """

    command: str
    machine: dict[str, str]
    limits: dict[str, float]
    tables: dict[str, list[dict]] = field(default_factory=dict)
    summary: dict[str, float | str] = field(default_factory=dict)
    panels: list[Callable] = field(default_factory=list)

    def add(self, title: str, row: dict) -> None:
        """Add a row to the table ``title``, and print it, because a run takes minutes."""
        self.tables.setdefault(title, []).append(row)
        print(', '.join(f'{k} {text(v)}' for k, v in row.items()), file=sys.stderr, flush=True)

    def speed(self, flops: int, seconds: float, dtype: torch.dtype = torch.float32) -> dict:
        """Columns that compare the achieved rate with the peak measured in this run."""
        achieved = flops / seconds / 1e9
        limit = best_gflops(self.limits, dtype)
        share = 100 * achieved / limit if limit else None
        return {'GFLOP/s': achieved, '% of the best GEMM': share}

    def average(self, title: str, ratios: dict[str, Spread | str]) -> None:
        """Add the geometric mean of ``ratios``, if all could be measured."""
        if all(isinstance(r, Spread) for r in ratios.values()):
            mean = geometric_mean([r.median for r in ratios.values()])
            self.summary[f'{title}, geometric mean of {len(ratios)}'] = mean

    def conclude(self, title: str, ratios: dict[str, Spread | str]) -> None:
        """Add the average of ``ratios`` and their picture."""
        self.average(title, ratios)
        self.panels = bars(ratios, title)

    def refusals(self) -> list[str]:
        """The rows whose sides have different outputs."""
        rows = [row for rows in self.tables.values() for row in rows]
        found = (
            f'{next(iter(row.values()))}: {value}'
            for row in rows
            for value in row.values()
            if isinstance(value, str) and value.startswith('no ratio')
        )
        return list(dict.fromkeys(found))  # a row may hold several ratios

    def __str__(self) -> str:
        facts = {**self.machine, **{k: number(v) for k, v in self.limits.items()}}
        lines = [f'`{self.command}`', '', '; '.join(f'{k} {v}' for k, v in facts.items()) + '.']
        for title, rows in self.tables.items():
            lines += ['', f'**{title}**', '', markdown(rows)]
        lines += ['', *(f'{k}: {text(v)}' for k, v in self.summary.items())]
        return '\n'.join(lines)

    def save(self, path: str | Path) -> None:
        """Everything as JSON, spreads as median, low and high."""
        content = {k: v for k, v in asdict(self).items() if k != 'panels'}
        write(path, lambda p: p.write_text(json.dumps(content, indent=2, default=str) + '\n'))

    def insert(self, path: str | Path, section: str) -> None:
        """Write everything between ``<!-- section -->`` and ``<!-- /section -->`` of a document."""
        before, begin, after = find_section(path, section)
        write(path, lambda p: p.write_text(f'{before}{begin}\n{self}\n{after}'))

    def plot(self, path: str | Path) -> None:
        if not self.panels:
            raise FastViTError('nothing to plot: no ratio could be measured')
        count = len(self.panels)
        figure, axes = plt.subplots(
            1, count, figsize=(8 * count, 5), layout='constrained', squeeze=False
        )
        for draw, own in zip(self.panels, axes[0], strict=True):
            draw(own)
        write(path, lambda p: figure.savefig(p, dpi=110))
        plt.close(figure)


def find_section(path: str | Path, section: str) -> tuple[str, str, str]:
    """The text before a section, the line that begins it, and the text from the line that ends it.

    Raises:
        FastViTError: the document or the section in it does not exist.
    """
    begin, end = f'<!-- {section} -->', f'<!-- /{section} -->'
    content = Path(path).read_text() if Path(path).is_file() else ''
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise FastViTError(f'{path} has no section {begin} ... {end} to fill: add both lines')
    return before, begin, end + after


def write(path: str | Path, save: Callable[[Path], None]) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
    except OSError as error:
        raise FastViTError(f'{path} cannot be written: {error.strerror}') from error


def bars(ratios: dict[str, Spread], title: str) -> list[Callable]:
    """A panel with a bar for each ratio and its quartiles; at 1 both sides are equal.

    No panel without a ratio.
    """
    ratios = {name: value for name, value in ratios.items() if isinstance(value, Spread)}

    def draw(axes):
        names = list(ratios)
        medians = np.array([r.median for r in ratios.values()])
        errors = [
            medians - [r.low for r in ratios.values()],
            [r.high for r in ratios.values()] - medians,
        ]
        axes.barh(names, medians, xerr=errors, color='tab:blue', ecolor='black', capsize=2)
        axes.axvline(1, color='black', linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel(title)

    return [draw] if ratios else []


def scatter(families: dict[str, list[tuple]], title: str) -> Callable:
    """A line for each family through its points, (name, ms, top-1 in %)."""

    def draw(axes):
        for family, points in families.items():
            names, times, accuracies = zip(*sorted(points, key=lambda p: p[1]), strict=True)
            own = family == 'FastViT'
            axes.plot(
                times, accuracies, 'o-', label=family, linewidth=2.5 if own else 1, zorder=2 + own
            )
            for name, x, y in zip(names, times, accuracies, strict=True):
                axes.annotate(name, (x, y), (3, -8), textcoords='offset points', fontsize=7)
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(title)
        axes.set_ylabel('ImageNet top-1, published, %')
        axes.grid(alpha=0.3)
        axes.legend()

    return draw


def curves(series: dict[str, tuple], title: str) -> Callable:
    """Log-log lines of (pixels, values) for square images; dashed lines show linear growth."""

    def draw(axes):
        for name, (pixels, values) in series.items():
            (line,) = axes.plot(pixels, values, 'o-', label=name)
            linear = np.asarray(pixels, dtype=float) / pixels[0] * values[0]
            axes.plot(pixels, linear, '--', color=line.get_color(), linewidth=0.8)
        axes.set_xscale('log')
        axes.set_yscale('log')
        sides = [round(p**0.5) for p in pixels]
        axes.set_xticks(pixels, [f'{s} x {s}' for s in sides], fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PLAIN)
        axes.set_xlabel('pixels (dashed: linear)')
        axes.set_ylabel(title)
        axes.grid(alpha=0.3, which='both')
        axes.legend()

    return draw
