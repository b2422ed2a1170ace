"""The files that explain a test: tables of classes and images, a confusion matrix, pictures."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .classes import class_table, confusion, draw_confusion, joint_table, names_of, text, write_csv
from .per_image import Judged, PerImage, Task

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
    sort_pictures(judged, folder)
    if not judged:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if task.unit:
        classes = list(metric.dataset_meta.get('classes') or ())
        every = [*classes, 'background'] if task.has_background else classes
        table = confusion(judged, len(every))
        names = names_of(every, len(table))
        rows = class_table(
            table, names[: len(table) - task.has_background], task.unit, **(precision or {})
        )
        draw_confusion(table, names, task.unit, folder / 'confusion.png')
    else:
        rows = joint_table(judged)
    write_csv(folder / 'classes.csv', rows)
    write_images(folder / 'images.csv', judged, task)
    return text(rows)


def write_images(path: Path, judged: Sequence[Judged], task: Task) -> None:
    """A row for each image, the worst first."""
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['image', task.measure, 'says', 'picture'])
        for one in judged:
            writer.writerow([one.path, f'{one.value:.6g}', one.says, one.picture])


def sort_pictures(judged: Sequence[Judged], folder: Path) -> None:
    """Number the pictures in the order of ``judged``; those of other images follow."""
    unsorted = folder / UNSORTED
    if not unsorted.is_dir():
        return
    for old in folder.glob('[0-9]' * 5 + '_*.jpg'):  # of an earlier test
        old.unlink()
    number = 0
    for one in judged:
        if one.picture and (unsorted / one.picture).exists():
            number += 1
            name = f'{number:05d}_{one.picture.partition("_")[2]}'
            (unsorted / one.picture).replace(folder / name)
            one.picture = name
    for other in sorted(unsorted.iterdir()):
        number += 1
        other.replace(folder / f'{number:05d}_{other.name.partition("_")[2]}')
    shutil.rmtree(unsorted)
