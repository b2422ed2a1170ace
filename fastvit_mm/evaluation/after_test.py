"""The files that explain a test: tables of classes and images, a confusion matrix, pictures."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .classes import class_table, confusion, draw_confusion, joint_table, names_of, text, write_csv
from .per_image import Judged, PerImage, Task

LIST = 'images.csv'
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
        draw_confusion(table, names, task.unit, folder / 'confusion.png')
    else:
        rows = joint_table(judged)
    write_csv(folder / 'classes.csv', rows)
    return text(rows)


def write_images(path: Path, judged: Sequence[Judged], others: Sequence[str], task: Task) -> None:
    """A row for each image, the worst first; pictures of images without truth follow."""
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['image', task.measure, 'says', 'picture'])
        for one in judged:
            writer.writerow([one.path, f'{one.value:.6g}', one.says, one.picture])
        writer.writerows(['', '', '', name] for name in others)


def remove_earlier(folder: Path) -> None:
    """Remove the pictures that an earlier test listed; whatever else is there stays."""
    if not (folder / LIST).is_file():
        return
    with (folder / LIST).open(newline='', encoding='utf-8') as file:
        names = {row.get('picture') or '' for row in csv.DictReader(file)}
    for name in names & {path.name for path in folder.glob('*.jpg')}:
        (folder / name).unlink()


def sort_pictures(judged: Sequence[Judged], folder: Path) -> list[str]:
    """Number the pictures in the order of ``judged``; gives those of other images, which follow."""
    unsorted = folder / UNSORTED
    if not unsorted.is_dir():
        return []
    remove_earlier(folder)
    drawn = [one for one in judged if one.picture and (unsorted / one.picture).exists()]
    others = sorted({path.name for path in unsorted.iterdir()} - {one.picture for one in drawn})
    names = []
    for number, old in enumerate([*(one.picture for one in drawn), *others], 1):
        names.append(f'{number:05d}_{old.partition("_")[2]}')
        (unsorted / old).replace(folder / names[-1])
    for one, name in zip(drawn, names, strict=False):
        one.picture = name
    shutil.rmtree(unsorted)
    return names[len(drawn) :]
