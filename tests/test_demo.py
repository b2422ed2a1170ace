"""The demo data, judged by tools that did not write them, and the demo form of every config."""

import copy
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from fastvit_mm.demo import apply_demo, make_data, scenes
from fastvit_mm.errors import FastViTError
from fastvit_mm.hand_mesh import demo_data

REPO = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    path
    for path in (REPO / 'configs').rglob('*.py')
    if '_base_' not in path.parts and 'train_cfg' in Config.fromfile(path)
)


@pytest.fixture(scope='module', autouse=True)
def few_hands():
    """Nothing here looks at the hands; their pictures are judged in test_hand_mesh_data.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_data.SPEC, 'hands', (60, 15))
        yield


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('demo'))


@pytest.fixture
def small(monkeypatch):
    """Data sets of a few pictures, for tests that draw some themselves."""
    for name, spec in scenes.LAYOUTS.items():
        monkeypatch.setitem(scenes.LAYOUTS, name, spec | dict(images=(15, 10)))


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_polygons_boxes_and_areas_agree(root, split):
    coco = COCO(str(root / f'coco/annotations/instances_{split}2017.json'))
    assert [one['name'] for one in coco.loadCats(coco.getCatIds())] == list(scenes.CLASSES)
    assert len(coco.imgs) == scenes.LAYOUTS['coco']['images'][scenes.SPLITS.index(split)]
    sizes, per_image, overlap = set(), set(), 0
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(root / f'coco/{split}2017' / image['file_name']) as picture:
            assert picture.size == (image['width'], image['height'])
        sizes.add((image['width'], image['height']))
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert annotations
        per_image.add(len(annotations))
        covered = np.zeros((image['height'], image['width']), int)
        for one in annotations:
            mask = coco.annToMask(one)
            covered += mask
            # Eight times as fine, where no tip falls between the pixels.
            polygons = [[8 * value for value in line] for line in one['segmentation']]
            fine = rle.merge(rle.frPyObjects(polygons, 8 * image['height'], 8 * image['width']))
            assert np.abs(rle.toBbox(fine) / 8 - one['bbox']).max() <= 0.5
            assert rle.area(fine) / 64 == pytest.approx(one['area'], rel=0.03)
            left, top, width, height = one['bbox']
            assert left >= 0 and left + width <= image['width']
            assert top >= 0 and top + height <= image['height']
        assert (covered <= 1).mean() > 0.99  # the polygons hold the visible parts
        overlap += (covered > 1).sum()
    assert len(sizes) > 1 and len(per_image) > 2


def test_coco_categories_name_the_shapes(root):
    """By OpenCV's geometry: how much of its convex hull, and that of the circle around, a shape
    fills. Others hide parts of some, hence medians."""
    coco = COCO(str(root / 'coco/annotations/instances_train2017.json'))
    shapes = {
        'circle': (1, 0.9),
        'cross': (0.71, 0.8),
        'moon': (0.76, 0.45),  # half a disc has half of the circle around it
        'star': (0.55, 0.7),
        'triangle': (1, 0.42),  # 3 sqrt(3) / 4 pi
    }
    for category in coco.loadCats(coco.getCatIds()):
        fills = []
        for one in coco.loadAnns(coco.getAnnIds(catIds=category['id'])):
            line = np.float32(one['segmentation'][0]).reshape(-1, 2)
            hull = cv2.contourArea(cv2.convexHull(line))
            circle = np.pi * cv2.minEnclosingCircle(line)[1] ** 2
            fills.append((cv2.contourArea(line) / hull, hull / circle))
        assert np.median(fills, 0) == pytest.approx(shapes[category['name']], abs=0.05)


@pytest.mark.parametrize('split', ['training', 'validation'])
def test_ade20k_annotations_have_every_label_and_unlabelled_pixels(root, split):
    folder = root / 'ade20k/ADEChallengeData2016'
    files = sorted((folder / 'annotations' / split).glob('*.png'))
    images = sorted((folder / 'images' / split).glob('*.jpg'))
    assert [path.stem for path in files] == [path.stem for path in images]
    seen = np.zeros(256, int)
    for path, image in zip(files, images, strict=True):
        labels = Image.open(path)
        assert labels.mode == 'L' and labels.size == Image.open(image).size
        seen += np.bincount(np.asarray(labels).ravel(), minlength=256)
    assert (seen[: len(scenes.SCENE_CLASSES) + 1] > 0).all()
    assert not seen[len(scenes.SCENE_CLASSES) + 1 :].any()
    shares = seen[2 : len(scenes.SCENE_CLASSES) + 1] / seen.sum()
    assert shares.min() > 0.5 * shares.max()
    assert 0.02 < seen[0] / seen.sum() < 0.2


def read_folders(folder):
    """Images as N x height x width x 3 in 0 to 1, and labels as N, in the order of the folders."""
    names = sorted(path.name for path in folder.iterdir())
    assert names == list(scenes.CLASSES)
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).iterdir())
    ]
    images = np.stack([np.asarray(Image.open(path)) for path, _ in files]) / 255
    return images, np.array([label for _, label in files])


def test_colour_does_not_give_the_class_away(root):
    """Least squares on mean, spread and histogram of each colour: what texture-blind eyes see."""

    def features(images):
        flat = images.reshape(len(images), -1, 3)
        histogram = [
            ((flat >= low) & (flat < low + 0.125)).mean(1) for low in np.arange(0, 1, 0.125)
        ]
        columns = np.concatenate([flat.mean(1), flat.std(1), *histogram], 1)
        return np.concatenate([columns, columns**2, np.ones((len(images), 1))], 1)

    images, labels = read_folders(root / 'imagenet/train')
    new_images, new_labels = read_folders(root / 'imagenet/val')
    onehot = np.eye(len(scenes.CLASSES))[labels]
    weights = np.linalg.lstsq(features(images), onehot, rcond=1e-6)[0]
    right = (features(new_images) @ weights).argmax(1) == new_labels
    chance = 1 / len(scenes.CLASSES)
    assert right.mean() < chance + 0.1
    means = np.stack([images[labels == label].mean((0, 1, 2)) for label in range(len(onehot[0]))])
    nearest = np.linalg.norm(new_images.mean((1, 2))[:, None] - means, axis=2).argmin(1)
    assert (nearest == new_labels).mean() < chance + 0.1


def test_same_seed_same_bytes_and_splits_differ(small, tmp_path):
    first, second = make_data(tmp_path / 'a'), make_data(tmp_path / 'b')
    assert digests(first) == digests(second)
    assert digests(first) != digests(make_data(tmp_path / 'c', seed=1))
    pictures = [
        value for name, value in digests(first).items() if name.lower().endswith(('.jpg', '.jpeg'))
    ]
    assert len(set(pictures)) == len(pictures) == 3 * 25


def test_only_what_is_asked_for_and_only_once(small, tmp_path):
    make_data(tmp_path, ['coco'])
    assert [path.name for path in tmp_path.iterdir()] == ['coco']
    stamp = tmp_path / 'coco/stamp.json'
    before = stamp.stat().st_mtime_ns
    make_data(tmp_path, ['coco'])
    assert stamp.stat().st_mtime_ns == before


def test_an_interrupted_or_older_data_set_is_drawn_again(small, tmp_path, monkeypatch):
    def interrupted(path, picture):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, 'save', interrupted)
        make_data(tmp_path, ['ade20k'])
    assert not list(tmp_path.iterdir())

    make_data(tmp_path, ['ade20k'])
    whole = digests(tmp_path)
    (tmp_path / 'ade20k/stamp.json').write_text('{}')
    next(tmp_path.rglob('*.png')).unlink()
    (tmp_path / 'ade20k/left-over').touch()
    make_data(tmp_path, ['ade20k'])
    assert digests(tmp_path) == whole


def test_a_folder_that_cannot_be_written_gives_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(FastViTError, match='cannot write the demo data') as caught:
        make_data(tmp_path / 'file' / 'data')
    assert '\n' not in str(caught.value)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request):
    return Config.fromfile(request.param)


def test_twice_is_once(root, config):
    once = copy.deepcopy(apply_demo(config, root).to_dict())
    assert apply_demo(config, root).to_dict() == once
    assert Config(copy.deepcopy(once)).demo  # and after a round trip through a file


def every(node):
    """Every (key, value) in a config."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from every(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from every(value)


def test_nothing_is_downloaded_or_missing(root, config):
    cfg = apply_demo(config, root)
    text = json.dumps(cfg.to_dict(), default=str)
    assert 'http' not in text and 'Pretrained' not in text and 'apple_in1k' not in text
    assert not cfg.load_from
    assert not any(value for key, value in every(cfg.to_dict()) if key == 'pretrained')
    for split in ('train', 'val', 'test'):
        folder = Path(cfg[f'{split}_dataloader'].dataset.data_root)
        for key, value in every(cfg[f'{split}_dataloader'].to_dict()):
            if key in ('img_path', 'seg_map_path', 'img', 'ann_file', 'split'):
                assert (folder / value).exists()
        for key, value in every(cfg.get(f'{split}_evaluator', {})):
            assert key != 'ann_file' or Path(value).is_file()


def test_same_model_losses_optimizer_and_metric(root, config):
    """Only numbers change, except where the data set's class is too narrow for other classes."""

    def kinds(cfg):
        schedule = {'param_scheduler'} if cfg.default_scope == 'mmengine' else set()
        kept = {key: value for key, value in cfg.to_dict().items() if key not in schedule}
        return {value for key, value in every(kept) if key == 'type'}

    before = kinds(config)
    paramwise = copy.deepcopy(config.optim_wrapper.get('paramwise_cfg'))
    cfg = apply_demo(config, root)
    after = kinds(cfg)
    assert before - after <= {'Pretrained', 'ADE20KDataset', 'AmpOptimWrapper'}
    assert after - before <= {'BaseSegDataset', 'OptimWrapper'}
    wanted = {'mano_': 'Adam', '_linear_': 'SGD'}
    wanted = next((v for k, v in wanted.items() if k in cfg.filename), 'AdamW')
    assert cfg.optim_wrapper.optimizer.type == wanted
    assert cfg.optim_wrapper.get('paramwise_cfg') == paramwise


def test_schedules_end_with_the_run(root, config):
    before = copy.deepcopy(config)
    cfg = apply_demo(config, root)
    loader = cfg.train_dataloader
    drawn = {'mmdet': 'coco', 'mmseg': 'ade20k', 'mmpretrain': 'imagenet'}.get(cfg.default_scope)
    images = scenes.LAYOUTS[drawn]['images'][0] if drawn else 4 * demo_data.SPEC['hands'][0]
    if 'max_epochs' in cfg.train_cfg:
        total = cfg.train_cfg.max_epochs * (images // loader.batch_size)
        part = total / before.train_cfg.max_epochs
    else:
        total = cfg.train_cfg.max_iters
        part = total / before.train_cfg.max_iters
    if cfg.default_scope == 'mmengine':  # hand meshes: a schedule of its own
        assert total <= (4800 if 'mano_' in cfg.filename else 2600)
        assert [one.type for one in cfg.param_scheduler] == ['LinearLR', 'CosineAnnealingLR']
        before.param_scheduler, part = copy.deepcopy(cfg.param_scheduler), 1
    else:
        assert total < 2000
    for old, new in zip(before.param_scheduler, cfg.param_scheduler, strict=True):
        assert new.type == old.type and not new.by_epoch
        assert 0 <= new.begin < new.end <= total
        if new.begin > 0:  # follows the warm-up without a gap
            assert new.begin in {one.end for one in cfg.param_scheduler}
        if old.type != 'LinearLR':
            assert new.end == pytest.approx(old.end * part, abs=1)
        if 'T_max' in new:
            assert new.T_max == new.end - new.begin
        if 'milestones' in new:
            assert new.milestones == pytest.approx([one * part for one in old.milestones], abs=1)
    scale = cfg.optim_wrapper.optimizer.lr / before.optim_wrapper.optimizer.lr
    floors = [one.get('eta_min', 0) * scale for one in before.param_scheduler]
    assert [one.get('eta_min', 0) for one in cfg.param_scheduler] == pytest.approx(floors)


def test_sizes_shrink_once(root, config):
    sizes = {
        value for key, value in every(apply_demo(config, root).to_dict()) if key == 'crop_size'
    }
    assert all(32 <= np.min(size) <= 128 for size in sizes)


def test_an_unknown_scope_says_what_is_known():
    with pytest.raises(FastViTError, match=r'mmpretrain, mmdet, mmseg'):
        apply_demo(Config(dict(default_scope='mmpose')))
