"""Visualize predictions:
python tools/infer.py CONFIG CHECKPOINT_OR_EXPORTED IMAGE|FOLDER|VIDEO|- --out D [--json] ...

A folder is searched recursively, in sorted order, for all images that OpenCV can read; pictures
keep names and subfolders: FOLDER/a/b.png becomes D/a/b.jpg. A video VIDEO.avi becomes D/VIDEO.mp4
of the same size (odd sizes lose one pixel) and frame rate. `-` is one encoded image on standard
input.

Images are rotated upright according to their EXIF data, in pictures and JSON. An image that cannot
be read is reported and skipped; the exit code is then 1.

--json writes D/NAME.predictions.json and D/NAME.images.json, where NAME is the input's name. The
first is a list in COCO's results format, the second explains its ids: `images` are numbered from 1
(frames have a `frame_index` from 0), `categories` are the model's classes in order, from 1.
The results of each task:
  detection       image_id, category_id, score, bbox [x, y, width, height], segmentation (RLE)
  segmentation    image_id, category_id, segmentation (RLE): one for each class present
  classification  image_id, category_ids, labels, scores: the five most likely classes
  hand mesh       image_id, xyz, verts (metres, relative to the root joint), uv (pixels)
COCO('D/NAME.images.json').loadRes('D/NAME.predictions.json') reads the first two.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from pycocotools import mask as rle
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torchvision.datasets.folder import IMG_EXTENSIONS

import fastvit_mm
from fastvit_mm import launch, pictures
from fastvit_mm.data import decode
from fastvit_mm.errors import FastViTError

JPEG_SIDE = 65500  # pixels: libjpeg's limit
Images = Iterator[tuple[dict, np.ndarray | None]]  # its JSON entry, BGR; None: unreadable


def load(cfg: Config, checkpoint: str, device: str, reparam: bool) -> torch.nn.Module:
    """The model of a checkpoint or of an exported file."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FastViTError(f'--device {device} cannot be used: {reason}') from error
    if cfg.default_scope == 'mmpretrain':  # it shows a bar for every image
        from mmpretrain.utils import progress

        progress.disable_progress_bar = True
    return fastvit_mm.init_model(cfg, checkpoint, device, reparam)


def is_image(path: Path) -> bool:
    """Whether its content or its name is an image's, so that a damaged image is reported."""
    named = path.suffix.lower() in IMG_EXTENSIONS
    return path.is_file() and (named or cv2.haveImageReader(str(path)))


class Stills:
    """Images of a folder, a file or standard input, and the pictures made of them."""

    same_size = False

    def __init__(self, source: str, out: Path):
        root = Path(source)
        self.out, self.stdin = out, source == '-'
        self.root = root if root.is_dir() else root.parent
        self.paths = sorted(filter(is_image, root.rglob('*'))) if root.is_dir() else [root]
        if not self.paths:
            raise FastViTError(f'no images that OpenCV can read in {root}')
        self.name = 'stdin' if self.stdin else root.resolve().name if root.is_dir() else root.stem
        self.stems = Counter(path.with_suffix('') for path in self.paths)

    def __len__(self):
        return len(self.paths)

    def __iter__(self) -> Images:
        for path in self.paths:
            name = self.name if self.stdin else str(path.relative_to(self.root))
            try:
                content = sys.stdin.buffer.read() if self.stdin else path.read_bytes()
            except OSError:
                content = b''
            yield dict(file_name=name), decode(content)

    def write(self, known: dict, picture: np.ndarray) -> None:
        path = Path(known['file_name'])
        twins = self.stems[self.root / path.with_suffix('')] > 1  # a.png and a.jpg
        if max(picture.shape) > JPEG_SIDE:
            raise FastViTError('its picture would be larger than JPEG allows')
        mmcv.imwrite(picture, str(self.out / f'{path if twins else path.with_suffix("")}.jpg'))

    def close(self) -> None: ...


class Video:
    """The frames of a video, and the video made of them."""

    same_size = True

    def __init__(self, source: str, out: Path):
        self.capture = cv2.VideoCapture(source)
        if not self.capture.isOpened():
            raise FastViTError(f'{source} is neither an image nor a video that OpenCV can read')
        self.file, self.name = Path(source).name, Path(source).stem
        self.path, self.writer = out / f'{self.name}.mp4', None

    def __len__(self):
        """The number given in the file; some files give none or an estimate."""
        return max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Images:
        index = 0
        while (read := self.capture.read())[0]:
            yield dict(file_name=self.file, frame_index=index), read[1]
            index += 1
        if not index or index < 0.9 * len(self):
            yield dict(file_name=self.file, frame_index=index), None

    def write(self, known: dict, picture: np.ndarray) -> None:
        if self.writer is None:
            rate = self.capture.get(cv2.CAP_PROP_FPS)
            code, size = cv2.VideoWriter_fourcc(*'mp4v'), picture.shape[1::-1]
            self.writer = cv2.VideoWriter(str(self.path), code, rate if rate > 0 else 25, size)
            if not self.writer.isOpened():
                raise OSError(f'cannot create the video {self.path.name}')
        self.writer.write(picture)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()


def open_input(source: str, out: Path) -> Stills | Video:
    """Open the input, after checking that no original would be overwritten."""
    path = Path(source)
    if source == '-':
        return Stills(source, out)
    if not path.exists():
        raise FastViTError(f'input {source} does not exist: give an image, a folder, a video or -')
    folder = path if path.is_dir() else path.parent
    target = out.resolve()
    if folder.resolve() in ([target, *target.parents] if path.is_dir() else [target]):
        raise FastViTError(f'--out {out} is among the originals in {folder}: give another folder')
    return Stills(source, out) if path.is_dir() or is_image(path) else Video(source, out)


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


def encode(mask: np.ndarray) -> dict:
    """COCO's run-length encoding of a bool mask (H, W)."""
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(map(int, code['size'])), counts=code['counts'].decode())


def results(result, meta: dict, image_id: int) -> list[dict]:
    """A prediction as COCO results; the ids are explained above."""
    if 'pred_verts' in result:
        names = ('pred_xyz', 'pred_verts', 'pred_uv')
        return [dict(image_id=image_id, **{n[5:]: result.get(n).tolist() for n in names})]
    if isinstance(result, dict):
        best = pictures.likeliest(result)
        labels = [pictures.class_name(meta, label) for label in best]
        scores = [float(result['pred_scores'][label]) for label in best]
        ids = [label + 1 for label in best]
        return [dict(image_id=image_id, category_ids=ids, labels=labels, scores=scores)]
    if 'pred_instances' in result:
        found = result.pred_instances.cpu().numpy()
        records = []
        for index, (left, top, right, bottom) in enumerate(found.bboxes.tolist()):
            one = dict(image_id=image_id, category_id=int(found.labels[index]) + 1)
            one.update(score=float(found.scores[index]))
            one.update(bbox=[left, top, right - left, bottom - top])
            if 'masks' in found:
                one.update(segmentation=encode(found.masks[index]))
            records.append(one)
        return records
    field = result.pred_sem_seg.data[0].cpu().numpy()
    return [
        dict(image_id=image_id, category_id=label + 1, segmentation=encode(field == label))
        for label in np.unique(field).tolist()
    ]


def write_json(out: Path, name: str, images: list, found: list, meta: dict) -> None:
    names = meta.get('classes') or ()
    categories = [dict(id=index + 1, name=str(one)) for index, one in enumerate(names)]
    known = dict(info={}, images=images, categories=categories, annotations=[])
    for kind, content in (('predictions', found), ('images', known)):
        (out / f'{name}.{kind}.json').write_text(json.dumps(content) + '\n')


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


def main(argv: list[str] | None = None) -> None:
    description, _, details = __doc__.partition('\n\n')
    parser = launch.config_parser(description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = details
    parser.add_argument('checkpoint', help='weights in any layout, or an exported file')
    parser.add_argument('source', metavar='input', help='image, folder, video, or - for stdin')
    parser.add_argument('--out', required=True, help='folder for the pictures')
    parser.add_argument('--reparam', action='store_true', help='use the deploy form')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='minimum score of a box, 0 to 1 (0.3)'
    )
    parser.add_argument('--json', action='store_true', help="also write COCO's JSON formats")
    parser.add_argument(
        '--turntable', action='store_true', help='of a hand mesh, a GIF that turns, beside each'
    )
    parser.add_argument('--device', help='cpu, cuda, cuda:1 ... (cuda if available)')
    args = parser.parse_args(argv)

    if not 0 <= args.score_thr <= 1:
        raise FastViTError(f'--score-thr {args.score_thr} is not between 0 and 1')
    out = Path(args.out)
    source = open_input(args.source, out)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    cfg = launch.load_config(args)
    if args.turntable and cfg.model.type != 'HandMesh':
        raise FastViTError('--turntable is for hand meshes: leave it out')
    model = load(cfg, args.checkpoint, device, args.reparam)
    try:
        out.mkdir(parents=True, exist_ok=True)
        skipped = look(model, source, out, args.score_thr, args.json, args.turntable)
    except OSError as error:
        raise FastViTError(f'cannot write to {out}: {error}') from error
    if skipped:
        sys.exit(1)


if __name__ == '__main__':
    launch.run(main)
