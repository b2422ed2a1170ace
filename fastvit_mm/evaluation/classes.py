"""What a test says of each class: tables, and the confusion matrix as numbers and as a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .per_image import Judged, class_rates
from .report import aligned

SHOWN = 30  # rows of a table on the screen
LEGIBLE = 40  # classes of a picture
FINGERS = ('thumb', 'index', 'middle', 'ring', 'little')
JOINTS = ('wrist', *(f'{finger} {i}' for finger in FINGERS for i in (1, 2, 3, 4)))

# The share of a class's own that was recognized is what many call its accuracy.
HEADS = {('images', 'recall'): 'accuracy (recall)', ('pixels', 'recall'): 'accuracy (recall)'}

Table = list[dict[str, str | int | float]]  # a row for each class, the same keys in all


def confusion(judged: Sequence[Judged], classes: int) -> np.ndarray:
    """How often each class (rows) was taken for each (columns); int64, (classes, classes)."""
    pairs = np.concatenate([one.pairs for one in judged])
    size = max(classes, int(pairs[:, :2].max(initial=-1)) + 1)
    table = np.zeros((size, size), np.int64)
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), pairs[:, 2])
    return table


def names_of(classes: Sequence[str], number: int) -> list[str]:
    """A name for each of ``number`` classes."""
    return [str(classes[i]) if i < len(classes) else f'class {i}' for i in range(number)]


def class_table(table: np.ndarray, names: Sequence[str], unit: str, **more: np.ndarray) -> Table:
    """Rates of each class, in percent, nan where nothing was there to be counted.

    Args:
        table: of :func:`confusion`; may have more classes than ``names``, which get no row.
        more: further columns, (classes,) each, 0 to 1.
    """
    rates, counted = class_rates(table), table.sum(1)
    if unit != 'pixels':
        del rates['IoU']
    rows = []
    for i, name in enumerate(names):
        row = {'class': name, unit: int(counted[i])}
        row |= {key: round(100 * float(values[i]), 2) for key, values in more.items()}
        row |= {HEADS.get((unit, k), k): round(100 * float(v[i]), 2) for k, v in rates.items()}
        rows.append(row)
    return rows


def joint_table(judged: Sequence[Judged]) -> Table:
    """Errors of each joint after alignment, in mm."""
    errors = np.stack([one.errors for one in judged])
    return [
        {
            'joint': name,
            'mean (mm)': round(float(of.mean()), 2),
            'median (mm)': round(float(np.median(of)), 2),
            '95 % below (mm)': round(float(np.percentile(of, 95)), 2),
        }
        for name, of in zip(JOINTS, errors.T, strict=True)
    ]


def text(table: Table, limit: int = SHOWN) -> str:
    """A table for the screen; of a longer one, the rows with the lowest last column."""
    rows = table
    if len(table) > limit:
        last = list(table[0])[-1]
        rows = sorted(table, key=lambda row: (np.isnan(row[last]), row[last]))[:limit]
    cells = [[shown(value) for value in row.values()] for row in rows]
    lines = aligned([list(table[0]), *cells])
    return f'{lines}\n({limit} of {len(table)}, the lowest)' if len(table) > limit else lines


def shown(value: str | int | float) -> str:
    if isinstance(value, float):
        return '-' if np.isnan(value) else f'{value:.2f}'
    return f'{value:,}' if isinstance(value, int) else value


def write_csv(path: Path, table: Table) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(table[0]) if table else [])
        writer.writeheader()
        writer.writerows(table)


def most_confused(table: np.ndarray, limit: int) -> np.ndarray:
    """Indices of the classes with the most mistakes, in their own order."""
    if len(table) <= limit:
        return np.arange(len(table))
    wrong = table.sum(0) + table.sum(1) - 2 * np.diag(table)
    return np.sort(np.argsort(-wrong, kind='stable')[:limit])


def short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f'{name[: limit - 1].rstrip()}…'


def draw_confusion(table: np.ndarray, names: Sequence[str], unit: str, path: Path) -> None:
    """A confusion matrix as a picture, each row in percent of the true class.

    Of more than :data:`LEGIBLE` classes, those with the most mistakes are drawn.
    """
    chosen = most_confused(table, LEGIBLE)
    shares = 100 * table[chosen] / np.maximum(table[chosen].sum(1, keepdims=True), 1)
    shares, number = shares[:, chosen], len(chosen)
    labels = [short(names[i]) for i in chosen]
    side = max(4.2, 0.36 * number)
    figure = Figure((side + 2.9, side + 2.0), dpi=110, layout='constrained')
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap='Blues', vmin=0, vmax=100)
    axis.set_xticks(range(number), labels, rotation=90, fontsize=9, parse_math=False)
    axis.set_yticks(range(number), labels, fontsize=9, parse_math=False)
    axis.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axis.grid(which='minor', color='0.88', linewidth=0.6)
    axis.tick_params(which='both', length=0)
    for row, column in np.argwhere(shares >= 0.5):
        share = shares[row, column]
        colour = 'white' if share > 55 else 'black'
        axis.text(column, row, f'{share:.0f}', ha='center', va='center', fontsize=8, color=colour)
    axis.set_xlabel('predicted', fontsize=10)
    axis.set_ylabel('true', fontsize=10)
    title = f'% of the {unit} of each true class'
    if number < len(table):
        title += f'\n{number} of {len(table)} classes, those with the most mistakes'
    axis.set_title(title, fontsize=10, loc='left')
    figure.colorbar(image, ax=axis, shrink=0.6, label='%')
    figure.savefig(path)
