"""Predicting images, and drawing them beside it."""

import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastvit_mm
from fastvit_mm import pictures
from fastvit_mm.errors import FastViTError
from fastvit_mm.export.graphs import embeds
from fastvit_mm.running.device import use

from .beside import Beside, ahead, number_of_processes
from .results import results, write_json
from .sources import Stills, Video


def load(cfg: Config, checkpoint: str, device: str, reparam: bool) -> torch.nn.Module:
    """The model of a checkpoint or of an exported file."""
    use(device)
    if cfg.default_scope == 'mmpretrain':  # it shows a bar for every image
        from mmpretrain.utils import progress

        progress.disable_progress_bar = True
    return fastvit_mm.init_model(cfg, checkpoint, device, reparam)


def predict(model: torch.nn.Module, image: np.ndarray | None):
    if image is None:
        raise FastViTError('cannot be read')
    try:
        return fastvit_mm.inference(model, image)
    except cv2.error as error:  # the config's resizing leaves no pixels
        height, width = image.shape[:2]
        raise FastViTError(f'{width} x {height} pixels are too narrow') from error


def predictions(model: torch.nn.Module, images: list[np.ndarray | None]) -> list:
    """A prediction for each image, or the FastViTError that says what is wrong with it."""
    with suppress(cv2.error, FastViTError):  # one of them: which one, is found below
        if len(images) > 1 and all(image is not None for image in images):
            return fastvit_mm.inference(model, images, len(images))
    found = []
    for image in images:
        try:
            found.append(predict(model, image))
        except FastViTError as error:
            found.append(error)
    return found


def above(result, threshold: float):
    """A prediction without the boxes that score below ``threshold``."""
    if not isinstance(result, dict) and 'pred_instances' in result:
        found = result.pred_instances
        result.pred_instances = found[found.scores >= threshold]
    return result


def write_turntable(out: Path, known: dict, result) -> None:
    from fastvit_mm.hand_mesh.drawing import write_gif

    name = Path(known['file_name']).with_suffix('')
    frame = f'_{known["frame_index"]:06d}' if 'frame_index' in known else ''
    path = out / f'{name}{frame}.gif'
    write_gif(path, result.pred_verts.numpy(), result.faces.numpy())


def progress_bar(total: int) -> Progress:
    """A progress bar with the rate on stderr; none for a single image."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[rate]}'))
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=total == 1)


def light(result):
    """What drawing and JSON need of a prediction, on the CPU; without the scores of each pixel."""
    if isinstance(result, dict):
        return result
    if 'pred_sem_seg' in result:
        labels = result.pred_sem_seg.data.cpu().to(torch.int16)
        return type(result)(pred_sem_seg=PixelData(data=labels))
    return result.cpu()


@dataclass
class Picture:
    """Draws a prediction, writes the picture unless that has to wait for others, and gives the
    picture, if so, and the JSON records."""

    source: Stills | Video
    out: Path
    meta: dict
    coco: bool
    turntable: bool

    def __call__(self, index: int, known: dict, image: np.ndarray, result) -> tuple:
        records = results(result, self.meta, index) if self.coco else []
        if 'embedding' in result:  # nothing to see
            return None, records
        picture = pictures.draw(image, result, self.meta, self.source.same_size)
        if not self.source.in_order:
            self.source.write(known, picture)
        if self.turntable:
            write_turntable(self.out, known, result)
        return picture if self.source.in_order else None, records


def name_of(known: dict) -> str:
    frame = f', frame {known["frame_index"]}' if 'frame_index' in known else ''
    return known['file_name'] + frame


class Report:
    """What became of the images, in their order."""

    def __init__(self, source: Stills | Video, bar: Progress):
        self.source, self.bar = source, bar
        self.images, self.found, self.skipped = [], [], 0
        self.begin = time.perf_counter()
        self.task = bar.add_task('', total=len(source) or None, rate='')

    def add(self, index: int, known: dict, shape: tuple, drawn: Future | FastViTError) -> None:
        """Wait for the picture, and note it."""
        try:
            if isinstance(drawn, FastViTError):
                raise drawn
            picture, records = Beside.result(name_of(known), drawn)
            if picture is not None:
                self.source.write(known, picture)
        except FastViTError as error:
            self.skipped += 1
            self.bar.console.print(f'{name_of(known)}: {error}, skipped')
        else:
            height, width = shape[:2]
            self.images.append(dict(id=index, **known, height=height, width=width))
            self.found += records
        self.bar.update(self.task, completed=index, rate=f'{self.rate(index):.1f} images/s')

    def rate(self, number: int) -> float:
        return number / (time.perf_counter() - self.begin)


def drain(report: Report, waiting: deque) -> Exception | None:
    """Note what is still being drawn; gives the first error."""
    first = None
    while waiting:
        try:
            report.add(*waiting.popleft())
        except Exception as error:
            first = first or error
    return first


def look(
    model: torch.nn.Module,
    source: Stills | Video,
    out: Path,
    threshold: float,
    coco: bool,
    turntable: bool = False,
    batch_size: int = 1,
) -> int:
    """Draw every image of ``source``; finished ones are kept if it is interrupted.

    The next images are read, and the last ones drawn, while the network computes.

    Args:
        batch_size: images that are computed together, if they have the same size.

    Returns:
        The number of images that could not be used.
    """
    meta = getattr(model, 'dataset_meta', None) or {}
    draw = Picture(source, out, meta, coco, turntable)
    processes = number_of_processes() if len(source) != 1 else 0
    with Beside(draw, processes) as drawing, progress_bar(len(source)) as bar:
        report, waiting = Report(source, bar), deque()
        try:
            try:
                images = enumerate(ahead(source) if processes else source, 1)
                while batch := list(islice(images, batch_size)):
                    predicted = predictions(model, [image for _, (_, image) in batch])
                    for (index, (known, image)), result in zip(batch, predicted, strict=True):
                        shape, drawn = getattr(image, 'shape', ()), result
                        if not isinstance(result, FastViTError):
                            result = light(above(result, threshold))
                            drawn = drawing.submit(name_of(known), index, known, image, result)
                        waiting.append((index, known, shape, drawn))
                    while len(waiting) > 2 * processes:
                        report.add(*waiting.popleft())
            except BaseException:
                drain(report, waiting)
                raise
            if error := drain(report, waiting):
                raise error
        finally:
            source.close()
            if coco:
                write_json(out, source.name, report.images, report.found, meta)
    number = len(report.images)
    what = 'embeddings' if embeds(model) else 'drawn'
    print(f'{number} {what} in {out}, {report.rate(number):.1f} images/s, {report.skipped} skipped')
    return report.skipped
