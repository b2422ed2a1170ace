"""The sheet of training images, held against images whose labels are known."""

import cv2
import numpy as np
import pytest
import torch
from bad_data import CONFIGS as TASKS
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.model import ImgDataPreprocessor
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.structures import DataSample
from mmseg.models import SegDataPreProcessor
from mmseg.structures import SegDataSample
from test_check_data import data  # noqa: F401
from test_tools import (
    home,  # noqa: F401
    refusal,
    tool,  # noqa: F401
)

from fastvit_mm.data import sheet

CLASSES = ('ant', 'bee', 'cat', 'dog')
NORMALIZED = dict(mean=[120, 110, 100], std=[60, 50, 40])


@pytest.mark.parametrize(
    'preprocessor',
    [
        ClsDataPreprocessor(**NORMALIZED, to_rgb=True),
        ClsDataPreprocessor(**NORMALIZED),
        ClsDataPreprocessor(to_rgb=True),
        SegDataPreProcessor(**NORMALIZED, bgr_to_rgb=True, size=(8, 8)),
        DetDataPreprocessor(**NORMALIZED, bgr_to_rgb=True),
        ImgDataPreprocessor(**NORMALIZED, bgr_to_rgb=True),
    ],
)
def test_an_image_is_shown_as_it_was_loaded(preprocessor):
    """In its own colours, whatever the network wants."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    inputs = [torch.from_numpy(image.transpose(2, 0, 1).copy())]
    kind = dict(ClsDataPreprocessor=DataSample, SegDataPreProcessor=SegDataSample)
    sample = kind.get(type(preprocessor).__name__, BaseDataElement)(metainfo=dict(img_shape=(8, 8)))
    if isinstance(preprocessor, DetDataPreprocessor):
        preprocessor.pad_mask = False
    batch = preprocessor(dict(inputs=inputs, data_samples=[sample]), False)
    assert (sheet.visible(batch['inputs'][0], preprocessor) == image).all()


def test_a_mixed_image_has_several_labels():
    sample = DataSample().set_gt_score(torch.tensor([0.0, 0.3, 0.69, 0.01]))
    assert sheet.label_of(sample, dict(classes=CLASSES)) == 'cat 69%, bee 30%'
    sample = DataSample().set_gt_label(3).set_gt_score(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert sheet.label_of(sample, dict(classes=CLASSES)) == 'dog'


SHAPE, CORNER = (96, 128), (slice(0, 40), slice(88, 128))  # the upper right one
LABELS = dict(classes=CLASSES[:2], palette=[(128, 128, 128), (0, 255, 0)])


def labelled(task):
    """The preprocessor and a sample whose label is in the corner."""
    about = dict(img_shape=SHAPE, ori_shape=SHAPE)
    mask = np.zeros(SHAPE, np.uint8)
    mask[CORNER] = 1
    if task == 'classification':
        sample = DataSample(metainfo=about).set_gt_label(1)
        return ClsDataPreprocessor(**NORMALIZED, to_rgb=True), sample
    if task == 'segmentation':
        field = PixelData(data=torch.from_numpy(mask)[None].long())
        sample = SegDataSample(metainfo=about, gt_sem_seg=field)
        return SegDataPreProcessor(**NORMALIZED, bgr_to_rgb=True, size=SHAPE), sample
    if task == 'detection':
        one = InstanceData(
            bboxes=torch.tensor([[88.0, 0, 128, 40]]),
            labels=torch.tensor([1]),
            masks=BitmapMasks(mask[None], *SHAPE),
        )
        sample = DetDataSample(metainfo=about, gt_instances=one)
        return DetDataPreprocessor(**NORMALIZED, bgr_to_rgb=True), sample
    uv = 4 + 32 * torch.rand(21, 2, generator=torch.Generator().manual_seed(0))
    sample = BaseDataElement(metainfo=about, uv=uv + torch.tensor([88.0, 0]))
    return ImgDataPreprocessor(**NORMALIZED, bgr_to_rgb=True), sample


@pytest.mark.parametrize('task', [*TASKS])
def test_labels_lie_on_what_they_label(task):
    """A blue square in a corner of a grey image, and its label in the same corner."""
    image = np.full((*SHAPE, 3), 120, np.uint8)
    image[CORNER] = 250, 20, 20
    preprocessor, sample = labelled(task)
    dataset = [dict(inputs=torch.from_numpy(image.transpose(2, 0, 1).copy()), data_samples=sample)]
    drawn = sheet.contact_sheet(list(sheet.augmented(dataset, preprocessor)), LABELS)
    plain = cv2.resize(image, (400, 300), interpolation=cv2.INTER_CUBIC)
    drawn = drawn[-312:-12].astype(int)  # below the caption
    corner = np.zeros((300, 400), bool)
    corner[:130, 270:] = True
    added = np.abs(drawn[:, :400] - plain).max(2) > 40
    if task in ('classification', 'segmentation'):
        assert not added.any()
    else:
        assert added[corner].sum() > 1000 and not added[~corner].any()
    if task == 'segmentation':
        green = drawn[:, 400:800, 1] - drawn[:, 400:800, ::2].max(2) > 60
        assert green[corner].mean() > 0.85 and not green[~corner].any()


def test_pixels_that_are_not_learned_are_black():
    assert sheet.ignore_index({}) == sheet.ignore_index(dict(decode_head=dict())) == 255
    head = dict(ignore_index=0)
    assert sheet.ignore_index(dict(decode_head=head)) == 0
    assert sheet.ignore_index(dict(decode_head=[dict(), head])) == 0
    image = np.full((*SHAPE, 3), 200, np.uint8)
    _, sample = labelled('segmentation')
    for ignored in (0, 1):
        drawn = sheet.tile(image, sample, dict(LABELS, ignore_index=ignored))[:, 400:]
        black = drawn.max(2) < 100
        assert black[5:120, 280:395].all() == black[:120, 280:].any() == (ignored == 1)
        assert black[130:].all() == black[130:].any() == (ignored == 0)


@pytest.mark.slow
@pytest.mark.parametrize('task', [*TASKS])
def test_a_sheet_of_training_images(data, tool, task, tmp_path):  # noqa: F811
    one = data(task) if task != 'hands' else hands(tmp_path)
    one.cfg.train_dataloader.update(num_workers=2, prefetch_factor=2)
    dark = []
    for target, file in (('sheet', 'sheet/train.png'), ('a.jpg', 'a.jpg')):
        one.write()
        code, err = tool('check_data', one.file, '--workers', 0, '--show', one.folder / target)
        assert code == 0, err
        drawn = cv2.imread(str(one.folder / file))
        width = 2 * sheet.SIDE if task == 'segmentation' else sheet.SIDE
        assert drawn.shape[1] > 3 * width and drawn.shape[0] > sheet.SIDE
        assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 1000
        dark.append((drawn.max(2) < 100).mean())
        if task == 'segmentation':
            one.cfg.model.decode_head.ignore_index = 0
    assert (abs(dark[1] - dark[0]) > 0.05) == (task == 'segmentation'), (
        dark
    )  # other pixels are black
    (taken := one.folder / 'taken').write_text('')
    refusal(tool('check_data', one.file, '--workers', 0, '--show', taken), 'cannot write')


def hands(folder):
    from bad_data import Data, draw

    with pytest.MonkeyPatch.context() as patch:
        return Data('hands', draw(folder, patch))
