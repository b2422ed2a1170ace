"""The files that explain a test: tables of classes and images, a confusion matrix, pictures."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastvit_mm.errors import FastViTError

from .classes import class_table, confusion, draw_confusion, joint_table, names_of, text, write_csv
from .per_image import TASKS, Judged, PerImage, Task

LIST, CLASSES, MATRIX = FILES = 'images.csv', 'classes.csv', 'confusion.png'
UNSORTED = '.unsorted'  # folder of pictures while the order of the images is not known


def write(
    metric: PerImage, folder: Path, precision: dict[str, np.ndarray] | None = None
) -> str | None:
    """Write all files of an evaluated metric and sort the pictures.

    Args:
        precision: average precision of each class, 0 to 1, by the name of its column.

    Returns:
        The table of classes for the screen; None if the truth of no image is known.
    """
    judged, task = metric.worst_first(), metric.task
    others = sort_pictures(judged, folder)
    if judged or others:
        folder.mkdir(parents=True, exist_ok=True)
        write_images(folder / LIST, judged, others, task)
    if not judged:
        return None
    if task.unit:
        classes = list(metric.dataset_meta.get('classes') or ())
        every = [*classes, 'background'] if task.has_background else classes
        table = confusion(judged, len(every))
        names = names_of(every, len(table))
        rows = class_table(
            table, names[: len(table) - task.has_background], task.unit, **(precision or {})
        )
        draw_confusion(table, names, task.unit, folder / MATRIX)
    else:
        rows = joint_table(judged)
    write_csv(folder / CLASSES, rows)
    return text(rows)


def write_images(path: Path, judged: Sequence[Judged], others: Sequence[str], task: Task) -> None:
    """A row for each image, the worst first; pictures of images without truth follow."""
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(header(task))
        for one in judged:
            writer.writerow([one.path, f'{one.value:.6g}', one.details, one.picture])
        writer.writerows(['', '', '', name] for name in others)


def header(task: Task) -> list[str]:
    return ['image', task.measure, 'details', 'picture']


def of_a_test(path: Path) -> bool:
    """Whether this is a list that :func:`write` wrote."""
    if not path.is_file():
        return False
    with path.open(newline='', encoding='utf-8', errors='replace') as file:
        return next(csv.reader(file), None) in map(header, TASKS.values())


def prepare(folder: Path, draw: bool) -> None:
    """Make a folder ready for :func:`write`, and for pictures.

    Raises:
        FastViTError: it has files of the same names that are not those of an earlier test.
    """
    there = [name for name in FILES if (folder / name).exists()]
    if there and not of_a_test(folder / LIST):
        raise FastViTError(
            f'{folder / there[0]} is not of an earlier test and would be overwritten: give another '
            'folder'
        )
    if draw:
        shutil.rmtree(folder / UNSORTED, ignore_errors=True)  # of a test that was interrupted
        (folder / UNSORTED).mkdir(parents=True)


def remove_earlier(folder: Path) -> None:
    """Remove the pictures that an earlier test listed; whatever else is there stays."""
    if not of_a_test(folder / LIST):
        return
    with (folder / LIST).open(newline='', encoding='utf-8') as file:
        names = {row.get('picture') or '' for row in csv.DictReader(file)}
    for name in names & {path.name for path in folder.glob('*.jpg')}:
        (folder / name).unlink()


def numbered(names: Sequence[str]) -> list[str]:
    """Pictures by their places in this list instead of those in the test, NUMBER_NAME.jpg."""
    digits = max(5, len(str(len(names))))
    return [f'{place:0{digits}d}_{old.partition("_")[2]}' for place, old in enumerate(names, 1)]


def sort_pictures(judged: Sequence[Judged], folder: Path) -> list[str]:
    """Number the pictures in the order of ``judged``; gives those of other images, which follow."""
    unsorted = folder / UNSORTED
    if not unsorted.is_dir():
        return []
    remove_earlier(folder)
    drawn = [one for one in judged if one.picture and (unsorted / one.picture).exists()]
    others = sorted({path.name for path in unsorted.iterdir()} - {one.picture for one in drawn})
    every = [*(one.picture for one in drawn), *others]
    names = numbered(every)
    for old, new in zip(every, names, strict=True):
        (unsorted / old).replace(folder / new)
    for one, name in zip(drawn, names, strict=False):
        one.picture = name
    shutil.rmtree(unsorted)
    return names[len(drawn) :]
