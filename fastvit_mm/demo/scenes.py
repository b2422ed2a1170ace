"""Generated scenes of shapes, written in the layouts of ImageNet, COCO and ADE20K.

Only the shape defines the class. Colours, textures, areas, rotations and positions of all classes
come from the same distributions, so neither the colour nor the size of an object gives it away.
"""

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from fastvit_mm.errors import FastViTError

VERSION = 3  # increase it when the pictures change: older copies are then drawn again
CLASSES = ('circle', 'cross', 'moon', 'star', 'triangle')  # sorted, as image folders are
SCENE_CLASSES = ('background', *CLASSES)  # the classes of the annotation PNGs, 1 to 6 in the files
PALETTE = (
    (90, 90, 90),
    (230, 80, 60),
    (250, 190, 40),
    (60, 150, 240),
    (180, 90, 220),
    (70, 190, 90),
)
# Training and validation images, short side in pixels, objects per image, and the area of an
# object as a fraction of the short side's square.
LAYOUTS = {
    'imagenet': dict(images=(1500, 250), size=64, objects=(1, 1), area=(0.10, 0.25)),
    'coco': dict(images=(800, 100), size=64, objects=(1, 3), area=(0.08, 0.22)),
    'ade20k': dict(images=(1000, 60), size=64, objects=(1, 2), area=(0.12, 0.28)),
}
SPLITS = ('train', 'val')
TILT = np.pi / 12  # maximum tilt to either side; arbitrary rotations take far longer to learn
FINE = 4  # masks are drawn at this multiple of the resolution: smooth edges, exact polygons


@dataclass
class Instance:
    label: int  # index into CLASSES
    mask: np.ndarray  # bool, FINE * height x FINE * width: the visible part


@dataclass
class Scene:
    image: np.ndarray  # uint8, height x width x 3, RGB
    instances: list[Instance]  # later ones lie on top
    clutter: np.ndarray  # bool, FINE * height x FINE * width: strokes without a class


@cache
def outline(name):
    """The polygon of a shape, K x 2, centred on the origin and with an area of 1."""
    if name == 'cross':  # 6 x 6, with arms of width 2
        ends = (-1, 3), (1, 3), (1, 1), (3, 1), (3, -1), (1, -1)
        points = np.array([*ends, *[(-x, -y) for x, y in ends]], float)
    elif name == 'moon':  # half a circle and, inside it, half an ellipse
        turn = np.linspace(-np.pi / 2, np.pi / 2, 24)
        outer, inner = np.cos(turn), 0.3 * np.cos(turn[-2:0:-1])
        points = np.stack([[*outer, *inner], [*np.sin(turn), *np.sin(turn[-2:0:-1])]], 1)
    else:
        radii = {'circle': [1] * 48, 'star': [1, 0.42] * 5, 'triangle': [1] * 3}[name]
        turn = np.arange(len(radii)) * 2 * np.pi / len(radii) - np.pi / 2  # the first points up
        points = np.array(radii)[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    x, y = points.T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    return points / np.sqrt(area)


def texture(rng, height, width, colour, spread):
    """A random pattern between `colour` - `spread` and `colour` + `spread`: height x width x 3."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    along = np.cos(turn) * x + np.sin(turn) * y
    kind = rng.integers(4)
    if kind == 0:
        wave = np.zeros_like(x)
    elif kind == 1:  # gradient
        wave = along / np.abs(along).max()
    elif kind == 2:  # stripes
        wave = np.sign(np.sin(along * 2 * np.pi / rng.uniform(5, 12)))
    else:  # clouds
        coarse = rng.uniform(-1, 1, (rng.integers(4, 10), rng.integers(4, 10))).astype(np.float32)
        wave = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return colour + wave[..., None] * (rng.uniform(-spread, spread) + rng.uniform(-15, 15, 3))


def vivid(rng):
    """A saturated colour of any hue: RGB, 0 to 255. Backgrounds are greyish: objects stand out."""
    low, high = rng.uniform(0, 70), rng.uniform(170, 255)
    return rng.permutation([low, rng.uniform(low, high), high])


def draw_scene(rng, height, width, labels, area):
    """A scene with objects of these `labels`, except those for which there is no room.

    `area`: minimum and maximum area of an object as a fraction of the short side's square.
    """
    fine = (FINE * height, FINE * width)
    ground = rng.uniform(40, 215) + rng.uniform(-15, 15, 3)
    image = texture(rng, height, width, ground, 45)

    def paint(mask, colour, spread):
        nonlocal image
        alpha = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        image += alpha[..., None] * (texture(rng, height, width, colour, spread) - image)

    clutter = np.zeros(fine, np.uint8)
    for _ in range(rng.integers(3)):
        x, y = rng.uniform(0, 1, (2, 1)) + np.cumsum(rng.normal(0, 0.12, (2, 5)), 1)
        points = np.stack([x * fine[1], y * fine[0]], 1).astype(np.int32)
        stroke = cv2.polylines(
            np.zeros(fine, np.uint8), [points], False, 1, int(rng.integers(4, 9))
        )
        paint(stroke, rng.uniform(0, 255), 25)
        clutter |= stroke

    instances = []
    for label in labels:
        for _ in range(20):  # tries
            mask = place(rng, outline(CLASSES[label]), fine, area)
            left = [without_slivers(one.mask & ~mask) for one in instances]
            if all(keeps_shape(new, one.mask) for new, one in zip(left, instances, strict=True)):
                break
        else:
            continue
        paint(mask, vivid(rng), 25)
        for one, new in zip(instances, left, strict=True):
            one.mask = new
        instances.append(Instance(int(label), mask))
        clutter &= ~mask.view(np.uint8)
    image += rng.normal(0, rng.uniform(0, 8), image.shape)
    return Scene(image.clip(0, 255).round().astype(np.uint8), instances, clutter.astype(bool))


def place(rng, points, fine, area):
    """A bool mask of a shape, randomly tilted, stretched, scaled and placed inside the image."""
    height, width = fine
    turn, lean = rng.uniform(-TILT, TILT), rng.uniform(0, 2 * np.pi)
    # Stretch along a random direction by up to 1.1, keeping the area.
    axis = np.array([np.cos(lean), np.sin(lean)])
    stretch = rng.uniform(1, 1.1)
    shear = np.eye(2) / stretch + np.outer(axis, axis) * (stretch - 1 / stretch)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = points @ rotation @ shear * np.sqrt(rng.uniform(*area)) * min(fine)
    room = np.array([width, height]) - np.ptp(points, 0)
    if room.min() < 0:  # it is longer than the image
        points = points * (1 - 1.02 * np.max(-room / np.ptp(points, 0)))
        room = np.array([width, height]) - np.ptp(points, 0)
    points = points - points.min(0) + rng.uniform(0, room)
    mask = np.zeros(fine, np.uint8)
    cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 1, shift=4)
    return without_slivers(mask)


def without_slivers(mask):
    """A mask without parts thinner than three fine pixels, which no polygon could represent."""
    square = np.ones((3, 3), np.uint8)
    return cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_OPEN, square).astype(bool)


def keeps_shape(left, before):
    """Whether most of a partly covered object is left, in one piece and without holes."""
    if left.sum() < 0.7 * before.sum():
        return False
    outer, holes = contours(left)
    return len(outer) == 1 and not holes


def contours(mask):
    """The outlines of a mask's pieces and of its holes, each K x 1 x 2."""
    lines, tree = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    inside = [node[3] >= 0 for node in tree[0]]
    return (
        [line for line, hole in zip(lines, inside, strict=True) if not hole],
        [line for line, hole in zip(lines, inside, strict=True) if hole],
    )


def make_scenes(name, split, seed=0):
    """Yield the scenes of one split of a layout, each drawn from its own random stream."""
    spec = LAYOUTS[name]
    number, where = spec['images'][SPLITS.index(split)], list(LAYOUTS).index(name)
    for index in range(number):
        rng = np.random.default_rng([seed, where, SPLITS.index(split), index])
        count = rng.integers(spec['objects'][0], spec['objects'][1] + 1)
        # The first label cycles through the classes, so that all are equally frequent.
        labels = [index % len(CLASSES), *rng.integers(len(CLASSES), size=count - 1)]
        height = width = spec['size']
        if name != 'imagenet':  # sizes vary, as they do in COCO and ADE20K
            height, width = (
                int(spec['size'] * edge) for edge in rng.permutation([1, rng.choice([1, 1.25])])
            )
        yield index, draw_scene(rng, height, width, labels, spec['area'])


def write_imagenet(root, seed):
    """`<split>/<class>/<number>.JPEG`: one object in each picture."""
    for split in SPLITS:
        for index, scene in make_scenes('imagenet', split, seed):
            name = CLASSES[scene.instances[0].label]
            save(root / split / name / f'{name}_{index:05d}.JPEG', scene.image)


def write_coco(root, seed):
    """`<split>2017/*.jpg` and `annotations/instances_<split>2017.json` with polygons."""
    for split in SPLITS:
        images, annotations = [], []
        for index, scene in make_scenes('coco', split, seed):
            name = f'{index + 1:012d}.jpg'
            save(root / f'{split}2017' / name, scene.image)
            height, width = scene.image.shape[:2]
            images.append(dict(id=index + 1, file_name=name, height=height, width=width))
            for one in scene.instances:
                # Dropping points moves the line by less than a quarter of a pixel. Then convert
                # centres of fine pixels to the image's pixels.
                line = cv2.approxPolyDP(contours(one.mask)[0][0], 0.9, True)[:, 0]
                line = (line + 0.5) / FINE
                low, high = line.min(0), line.max(0)
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=index + 1,
                        category_id=one.label + 1,
                        segmentation=[line.ravel().tolist()],
                        bbox=[*low.tolist(), *(high - low).tolist()],
                        area=cv2.contourArea(line.astype(np.float32)),
                        iscrowd=0,
                    )
                )
        categories = [
            dict(id=label + 1, name=name, supercategory='shape')
            for label, name in enumerate(CLASSES)
        ]
        path = root / 'annotations' / f'instances_{split}2017.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=categories))
        )


def write_ade20k(root, seed):
    """`ADEChallengeData2016/{images,annotations}/{training,validation}`, labels from 1, 0 = none.

    Strokes of clutter and pixels shared by two classes are unlabelled.
    """
    for split, folder in zip(SPLITS, ('training', 'validation'), strict=True):
        for index, scene in make_scenes('ade20k', split, seed):
            fine = np.ones(scene.clutter.shape, np.uint8)
            fine[scene.clutter] = 0
            for one in scene.instances:
                fine[one.mask] = one.label + 2
            height, width = scene.image.shape[:2]
            cells = fine.reshape(height, FINE, width, FINE)
            labels = cells.min((1, 3))
            labels[labels != cells.max((1, 3))] = 0
            where = root / 'ADEChallengeData2016'
            name = f'ADE_{split}_{index + 1:08d}'
            save(where / 'images' / folder / f'{name}.jpg', scene.image)
            save(where / 'annotations' / folder / f'{name}.png', labels)


WRITERS = dict(imagenet=write_imagenet, coco=write_coco, ade20k=write_ade20k)


def save(path, picture):
    """Write RGB (height x width x 3) or labels (height x width) in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture.ndim == 3:
        picture = picture[..., ::-1]
    done, code = cv2.imencode(path.suffix, picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done, path
    path.write_bytes(code.tobytes())


def make_data(root='data/demo', names=tuple(LAYOUTS), seed=0):
    """Generate the data sets `names` under `root` unless they exist already; return `root`."""
    root = Path(root)
    for name in names:
        stamp = json.dumps(dict(version=VERSION, seed=seed, classes=CLASSES, **LAYOUTS[name]))
        draw_once(root / name, stamp, lambda new, name=name: WRITERS[name](new, seed))
    return root


def draw_once(final, stamp, write):
    """Let `write` fill the folder `final` unless its `stamp.json` says that this was done.

    A data set is drawn in a temporary folder and renamed when it is whole, so an interrupted run
    leaves none half made. `stamp` says what it is drawn from.
    """
    try:
        if is_current(final, stamp):
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{final.name}-', dir=final.parent) as folder:
            new = Path(folder, 'new')
            write(new)
            (new / 'stamp.json').write_text(stamp)
            if final.exists():
                final.rename(Path(folder, 'old'))
            try:
                new.rename(final)
            except OSError:  # another process was faster
                if not is_current(final, stamp):
                    raise
    except OSError as error:
        raise FastViTError(f'cannot write the demo data to {final}: {error}') from error


def is_current(folder, stamp):
    path = folder / 'stamp.json'
    return path.is_file() and path.read_text() == stamp
