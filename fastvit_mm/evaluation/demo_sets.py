"""Generated stand-ins for ImageNet-A, -R, -Sketch and ReaL, in their layouts."""

import json
from pathlib import Path

import cv2
import numpy as np

from fastvit_mm.demo.scenes import (
    CLASSES,
    FINE,
    LAYOUTS,
    contours,
    draw_once,
    draw_scene,
    outline,
    place,
    save,
)

from .catalogue import Catalogue

VERSION = 1  # increase it when the pictures change
IMAGES = 100  # of each set
SIZE = LAYOUTS['imagenet']['size']
AREA = LAYOUTS['imagenet']['area']
CROP = (SIZE, SIZE * 7 // 8)  # ImageNet-C's proportions
# The real ones have 200 of the 1000 classes.
OWN = dict(a=('circle', 'moon', 'star'), r=('circle', 'cross', 'star', 'triangle'))


def hard_scene(rng: np.random.Generator, label: int) -> np.ndarray:
    """For ImageNet-A: the object is small."""
    return draw_scene(rng, SIZE, SIZE, [label], (0.03, 0.06)).image


def rendition(rng: np.random.Generator, label: int) -> np.ndarray:
    """For ImageNet-R: like a print in few colours."""
    image = draw_scene(rng, SIZE, SIZE, [label], AREA).image
    smooth = cv2.bilateralFilter(image, 5, 60, 3)
    return (smooth // 64 * 64 + 32).astype(np.uint8)


def sketch(rng: np.random.Generator, label: int) -> np.ndarray:
    """For ImageNet-Sketch: dark outlines on white, drawn over more than once."""
    mask = place(rng, outline(CLASSES[label]), (SIZE * FINE, SIZE * FINE), AREA)
    canvas = np.full(mask.shape, 255, np.uint8)
    line = contours(mask)[0][0]
    for _ in range(2):
        shaky = line + rng.normal(0, 1.5, 2)
        cv2.polylines(canvas, [shaky.astype(np.int32)], True, int(rng.integers(90)), 6)
    grey = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)


NATURAL = dict(a=hard_scene, r=rendition, sketch=sketch)


def write_natural(folder: Path, name: str) -> None:
    """`<class>/<file>`; the sketches are numbered within their class, as the published ones."""
    own = OWN.get(name, CLASSES)
    for index in range(IMAGES):
        kind = own[index % len(own)]
        rng = np.random.default_rng([list(NATURAL).index(name), index])
        file = f'{name}_{index // len(own) if name == "sketch" else index}.JPEG'
        save(folder / kind / file, NATURAL[name](rng, CLASSES.index(kind)))


def write_real(folder: Path) -> None:
    """`val/<class>/ILSVRC2012_val_<number>.JPEG` with up to two objects, and `real.json`."""
    labels = []
    for index in range(IMAGES):
        rng = np.random.default_rng([len(NATURAL), index])
        first = index % len(CLASSES)
        count = 0 if index % 10 == 9 else int(rng.integers(1, 3))
        drawn = draw_scene(
            rng, SIZE, SIZE, [first, *rng.integers(len(CLASSES), size=1)][:count], AREA
        )
        labels.append(sorted({one.label for one in drawn.instances}))
        name = f'ILSVRC2012_val_{index + 1:08d}.JPEG'
        save(folder / 'val' / CLASSES[first] / name, drawn.image)
    (folder / 'real.json').write_text(json.dumps(labels))


def demo_catalogue(root: str = 'data/demo/robustness') -> Catalogue:
    """The generated sets, drawn under ``root`` unless they are there.

    Raises:
        FastViTError: they cannot be written.
    """
    stamp = json.dumps(dict(version=VERSION, images=IMAGES, size=SIZE, classes=CLASSES, own=OWN))
    roots = {name: Path(root, f'imagenet-{name}') for name in NATURAL}
    for name, folder in roots.items():
        draw_once(folder, stamp, lambda new, name=name: write_natural(new, name))
    real = Path(root, 'imagenet-real')
    draw_once(real, stamp, write_real)
    return Catalogue(
        roots={**roots, 'real': real / 'real.json', 'c': Path(root, 'imagenet-c')},
        classes=CLASSES,
        own=OWN,
        real_images=IMAGES,
        real_folder=real / 'val',
        crop=CROP,
    )
