"""Where images come from, and where the pictures made of them go."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import mmcv
import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastvit_mm.data import decode
from fastvit_mm.errors import FastViTError

JPEG_SIDE = 65500  # pixels: libjpeg's limit
Images = Iterator[tuple[dict, np.ndarray | None]]  # its JSON entry, BGR; None: unreadable


def is_image(path: Path) -> bool:
    """Whether its content or its name is an image's, so that a damaged image is reported."""
    named = path.suffix.lower() in IMG_EXTENSIONS
    return path.is_file() and (named or cv2.haveImageReader(str(path)))


class Stills:
    """Images of a folder, a file or standard input, and the pictures made of them."""

    same_size = in_order = False

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

    same_size = in_order = True

    def __init__(self, source: str, out: Path):
        self.capture = cv2.VideoCapture(source)
        if not self.capture.isOpened():
            raise FastViTError(f'{source} is neither an image nor a video that OpenCV can read')
        # Now, because while another thread reads, nothing else may be asked.
        self.rate = self.capture.get(cv2.CAP_PROP_FPS)
        self.length = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.file, self.name = Path(source).name, Path(source).stem
        self.path, self.writer = out / f'{self.name}.mp4', None

    def __len__(self):
        """The number given in the file; some files give none or an estimate."""
        return self.length

    def __iter__(self) -> Images:
        index = 0
        while (read := self.capture.read())[0]:
            yield dict(file_name=self.file, frame_index=index), read[1]
            index += 1
        if not index or index < 0.9 * len(self):
            yield dict(file_name=self.file, frame_index=index), None

    def write(self, known: dict, picture: np.ndarray) -> None:
        if self.writer is None:
            rate = self.rate if self.rate > 0 else 25
            code, size = cv2.VideoWriter_fourcc(*'mp4v'), picture.shape[1::-1]
            self.writer = cv2.VideoWriter(str(self.path), code, rate, size)
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
