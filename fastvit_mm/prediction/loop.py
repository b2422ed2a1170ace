"""Predicting and drawing, image by image."""

import time
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastvit_mm
from fastvit_mm import pictures
from fastvit_mm.errors import FastViTError
from fastvit_mm.running.device import use

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


def look(
    model: torch.nn.Module,
    source: Stills | Video,
    out: Path,
    threshold: float,
    coco: bool,
    turntable: bool = False,
) -> int:
    """Draw every image of ``source``; finished ones are kept if it is interrupted.

    Returns:
        The number of images that could not be used.
    """
    meta = getattr(model, 'dataset_meta', None) or {}
    images, found, skipped = [], [], 0
    begin = time.perf_counter()
    with progress_bar(len(source)) as bar:
        task = bar.add_task('', total=len(source) or None, rate='')
        try:
            for index, (known, image) in enumerate(source, 1):
                try:
                    result = above(predict(model, image), threshold)
                    source.write(known, pictures.draw(image, result, meta, source.same_size))
                    if turntable:
                        write_turntable(out, known, result)
                except FastViTError as error:
                    skipped += 1
                    where = f', frame {known["frame_index"]}' if 'frame_index' in known else ''
                    bar.console.print(f'{known["file_name"]}{where}: {error}, skipped')
                else:
                    height, width = image.shape[:2]
                    images.append(dict(id=index, **known, height=height, width=width))
                    found += results(result, meta, index)
                rate = f'{index / (time.perf_counter() - begin):.1f} images/s'
                bar.update(task, completed=index, rate=rate)
        finally:
            source.close()
            if coco:
                write_json(out, source.name, images, found, meta)
    seconds = time.perf_counter() - begin
    print(f'{len(images)} drawn in {out}, {len(images) / seconds:.1f} images/s, {skipped} skipped')
    return skipped
