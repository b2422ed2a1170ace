"""The cheaper transforms against mmpretrain's: the same pixels, or the same distribution."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS, TRANSFORMS
from mmpretrain.structures import DataSample
from test_configs import ROOT

import fastvit_mm.transforms  # noqa: F401  (registers them)
from fastvit_mm.demo.config import soften_augmentation

NAMES = ('', 'Fast')
IMAGE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def pair(**cfg):
    """mmpretrain's transform of ``type`` and the cheaper one."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return [TRANSFORMS.build({**cfg, 'type': p + cfg['type']}) for p in NAMES]


@pytest.mark.parametrize('backend', ['pillow', 'cv2'])
@pytest.mark.parametrize('scale', [48, (40, 56)])
def test_crops_are_the_same(backend, scale):
    for shape in (IMAGE, IMAGE[:10], IMAGE[:, :10]):  # the latter two crop in the middle at times
        theirs, ours = pair(
            type='RandomResizedCrop', scale=scale, backend=backend, interpolation='bicubic'
        )
        for seed in range(20):
            got = []
            for step in (theirs, ours):
                np.random.seed(seed)
                got.append((step(dict(img=shape.copy())), np.random.rand()))
            (a, after_a), (b, after_b) = got
            assert a['img_shape'] == b['img_shape'] and after_a == after_b
            np.testing.assert_array_equal(a['img'], b['img'])


@pytest.mark.parametrize('direction', ['horizontal', 'vertical', 'diagonal'])
def test_flips_are_the_same(direction):
    theirs, ours = pair(type='RandomFlip', prob=0.5, direction=direction)
    flips = 0
    for seed in range(20):
        got = []
        for step in (theirs, ours):
            np.random.seed(seed)
            got.append(step(dict(img=IMAGE.copy())))
        a, b = got
        assert (a['flip'], a['flip_direction']) == (b['flip'], b['flip_direction'])
        np.testing.assert_array_equal(a['img'], b['img'])
        assert b['img'].flags.c_contiguous and b['img'].flags.writeable
        flips += b['flip']
    assert 0 < flips < 20


@pytest.mark.parametrize(
    'image', [IMAGE, IMAGE[:, ::-1], IMAGE[..., :1], IMAGE[..., 0]], ids=lambda i: str(i.shape)
)
def test_packed_inputs_are_the_same(image):
    a, b = (step(dict(img=image.copy(), gt_label=3)) for step in pair(type='PackInputs'))
    assert torch.equal(a['inputs'], b['inputs']) and b['inputs'].is_contiguous()
    assert a['inputs'].dtype == b['inputs'].dtype == torch.uint8
    assert a['data_samples'].gt_label == b['data_samples'].gt_label


def erased(step, seed=0, size=256):
    """The whole image filled: (size * size, 3)."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    image = np.zeros((size, size, 3), np.uint8)
    return step._fill_pixels(image, 0, 0, size, size).reshape(-1, 3)


@pytest.mark.parametrize(
    'mean, std',
    [([103.53, 116.28, 123.675], [57.375, 57.12, 58.395]), ([10, 128, 250], [5, 20, 40])],
)
def test_noise_is_drawn_from_the_same_distribution(mean, std):
    """Byte for byte: also what is cut off at black and white, and rounding downwards."""
    cfg = dict(type='RandomErasing', mode='rand', fill_color=mean, fill_std=std)
    theirs, ours = (erased(step) for step in pair(**cfg))
    # of a mean over 65536 pixels, four standard errors of the difference are 0.022 std
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.022 * max(std))
    np.testing.assert_allclose(ours.std(0), theirs.std(0), atol=0.022 * max(std))
    for channel in range(3):
        a, b = (np.bincount(x[:, channel], minlength=256).cumsum() for x in (theirs, ours))
        assert np.abs(a - b).max() < 0.011 * len(ours)  # Kolmogorov and Smirnov, p = 0.001
    between = np.corrcoef(ours.T.astype(float)) - np.eye(3)
    assert np.abs(between).max() < 0.02
    neighbours = np.corrcoef(ours[:-1, 0], ours[1:, 0])[0, 1]
    assert abs(neighbours) < 0.02
    np.testing.assert_array_equal(ours, erased(pair(**cfg)[1]))
    assert (ours != erased(pair(**cfg)[1], seed=1)).any()


@pytest.mark.parametrize('settings', [dict(mode='const', fill_color=(1, 2, 3)), dict(mode='rand')])
def test_other_fillings_are_mmpretrains(settings):
    theirs, ours = pair(type='RandomErasing', **settings)
    np.testing.assert_array_equal(erased(theirs), erased(ours))


def test_only_the_rectangle_is_erased():
    theirs, ours = pair(
        type='RandomErasing', mode='rand', fill_color=[128] * 3, fill_std=[50] * 3, erase_prob=1.0
    )
    for seed in range(10):
        hits = []
        for step in (theirs, ours):
            np.random.seed(seed)
            torch.manual_seed(seed)
            image = np.full((90, 120, 3), 1000, np.int16)
            hits.append(step(dict(img=image))['img'] != 1000)
        np.testing.assert_array_equal(*hits)


@pytest.mark.parametrize('to_rgb', [True, False])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float])
@pytest.mark.parametrize('channels', [3, 1])
def test_batches_are_the_same(to_rgb, dtype, channels):
    """Stacked by the workers or not, with mixed labels; what comes in stays as it is."""
    settings = dict(
        mean=[123.675, 116.28, 103.53][:channels],
        std=[58.395, 57.12, 57.375][:channels],
        to_rgb=to_rgb,
        num_classes=5,
        pad_size_divisor=32,
        batch_augments=dict(augments=dict(type='Mixup', alpha=0.8)),
    )
    images = torch.randint(0, 256, (4, channels, 30, 40)).to(dtype)
    before = images.clone()
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs, ours = (
            MODELS.build(dict(type=p + 'ClsDataPreprocessor', **settings)) for p in NAMES
        )
    for inputs in (images, list(images)):
        for training in (True, False):
            got = []
            for preprocessor in (theirs, ours):
                np.random.seed(0)
                torch.manual_seed(0)
                samples = [DataSample().set_gt_label(i) for i in range(4)]
                got.append(preprocessor(dict(inputs=inputs, data_samples=samples), training))
            a, b = got
            assert torch.equal(a['inputs'], b['inputs']) and b['inputs'].shape[2:] == (32, 64)
            for x, y in zip(a['data_samples'], b['data_samples'], strict=True):
                assert torch.equal(x.gt_score, y.gt_score)
    assert torch.equal(images, before)
    assert (ours.to_rgb, ours._enable_normalize) == (to_rgb, True)


@pytest.mark.parametrize('name', ['t8', 't8_dist', 'sa24_384'])
def test_configs_import_them(name, tmp_path):
    """In an interpreter that knows nothing of this package."""
    path = ROOT / f'configs/classification/fastvit_{name}_in1k.py'
    code = f"""
from mmengine.config import Config
from mmpretrain.registry import MODELS, TRANSFORMS
cfg = Config.fromfile({str(path)!r})
for step in cfg.train_dataloader.dataset.pipeline:
    TRANSFORMS.build(step)
MODELS.build(cfg.data_preprocessor)
"""
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_demo_softens_them_too():
    for name in ('RandomResizedCrop', 'RandomErasing'):
        theirs, ours = dict(type=name), dict(type=f'Fast{name}')
        soften_augmentation(theirs)
        soften_augmentation(ours)
        assert len(ours) > 1 and {**ours, 'type': name} == theirs
