"""A few images of each task's demo data, the configs that read them, and ways to damage them."""

import copy
import io
import json
import struct
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from fastvit_mm import FastViTError, failures, launch
from fastvit_mm.data.check import Report, check
from fastvit_mm.demo import config as demo_config
from fastvit_mm.demo import scenes
from fastvit_mm.hand_mesh import demo_data

ROOT = Path(__file__).parent.parent
CONFIGS = dict(
    classification='configs/classification/fastvit_t8_in1k.py',
    detection='configs/detection/mask_rcnn_fastvit_t8_coco.py',
    segmentation='configs/segmentation/fpn_fastvit_sa36_ade20k.py',
    hands='configs/hand_mesh/mano_fastvit_t8_freihand.py',
)
FOLDERS = dict(  # of images, to train on and to test on
    classification=('imagenet/train', 'imagenet/val'),
    detection=('coco/train2017', 'coco/val2017'),
    segmentation=tuple(
        f'ade20k/ADEChallengeData2016/images/{s}' for s in ('training', 'validation')
    ),
    hands=('freihand/training/rgb', 'freihand/evaluation/rgb'),
)
IMAGES = (6, 5)


def draw(folder: Path, patch) -> Path:
    """The demo data of every task, a few images each."""
    for name, layout in scenes.LAYOUTS.items():
        patch.setitem(scenes.LAYOUTS, name, {**layout, 'images': IMAGES})
    patch.setitem(demo_data.SPEC, 'hands', (2, 2))
    scenes.make_data(folder)
    demo_data.make_freihand(folder / 'freihand')
    return folder


class Data:
    """One task's data in a folder of their own, and the config for them."""

    def __init__(self, task: str, folder: Path):
        self.task, self.folder = task, folder
        self.cfg = Config.fromfile(ROOT / CONFIGS[task])
        self.cfg.work_dir = str(folder / 'work')
        demo = demo_config.DEMOS[self.cfg.default_scope]
        classes = scenes.SCENE_CLASSES if task == 'segmentation' else scenes.CLASSES
        for node in demo_config.dicts(self.cfg._cfg_dict):
            demo_config.shrink_model(node, len(classes))
            demo_config.shrink_sizes(node, demo['shrink'])
        demo_config.use_data(self.cfg, demo, folder / demo['data'])
        for stage in ('train', 'val', 'test'):
            self.cfg[f'{stage}_dataloader'].batch_size = 2
        self.file = folder / 'config.py'

    def images(self, split: int) -> list[Path]:
        """All images to train on (0) or to test on (1)."""
        folder = self.folder / FOLDERS[self.task][split]
        return sorted(path for path in folder.rglob('*') if path.is_file())

    def mask(self, image: Path) -> Path:
        parts = ['annotations' if part == 'images' else part for part in image.parts]
        return Path(*parts).with_suffix('.png')

    def lists(self, split: int) -> Path:
        return self.folder / 'coco/annotations' / f'instances_{("train", "val")[split]}2017.json'

    def write(self) -> Path:
        """The config's file."""
        self.cfg.dump(self.file)
        return self.file

    def check(self) -> Report:
        return check(copy.deepcopy(self.cfg))

    def read(self, stage: str) -> str | None:
        """Read all samples as a run does; what it says if it stops."""
        cfg = copy.deepcopy(self.cfg)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            try:
                launch.check_data(cfg, stage)
                loader = launch.Runner.build_dataloader(cfg[f'{stage}_dataloader'], seed=0)
                for _ in islice(loader, len(loader)):
                    pass
            except FastViTError as error:
                return failures.meant_for_users(error)
        return None


# ------------------------------------------------------------------------------- files to put there


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    image.save(stream := io.BytesIO(), kind, **settings)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 50000 x 50000 pixels."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', check)

    header = struct.pack('>IIBBBBB', 50000, 50000, 8, 2, 0, 0, 0)
    parts = (b'IHDR', header), (b'IDAT', zlib.compress(bytes(1000))), (b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


def turned(image: Image.Image, orientation: int = 6) -> bytes:
    """A JPEG that shows ``image`` when turned upright by its EXIF data."""
    back = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image.transpose(back), 'JPEG', quality=95, exif=exif)


def sixteen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)


def change(path: Path, edit) -> None:
    """Edit a JSON file's content in place; what ``edit`` returns replaces it."""
    content = json.loads(path.read_text())
    new = edit(content)
    path.write_text(json.dumps(content if new is None else new))
