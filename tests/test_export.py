"""Exported files: run by runtimes that are not ours, held against the models they came from."""

import json
from collections import Counter

import mmcv
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from randomize import randomize, relative
from test_tools import (
    CLASSIFICATION,
    CONFIGS,
    DETECTION,
    SEGMENTATION,
    home,  # noqa: F401
    refusal,
    shallow,
    tool,  # noqa: F401
)

import fastvit_mm
from fastvit_mm import FastViT, FastViTError
from fastvit_mm.demo import apply_demo
from fastvit_mm.export import FORMATS, Session, export, verify
from fastvit_mm.reparameterize import absorb_output_norms, reparameterize

tasks = pytest.mark.parametrize('task', CONFIGS, ids=['seg', 'det', 'cls'])
ATTENTION = {'model.backbone.arch.attention': (0, 0, 0, 1)}
SIZE = (96, 64)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A small network with attention of each task, random weights and statistics, its checkpoint."""
    folder = tmp_path_factory.mktemp('models')
    made = {}
    for task in CONFIGS:
        path = shallow(task, folder)
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(ATTENTION)
        apply_demo(cfg, folder / 'data')
        if task == DETECTION:
            cfg.model.test_cfg.rcnn.score_thr = 0.12
        model = fastvit_mm.init_model(cfg)
        randomize(model)
        if task == DETECTION:
            with torch.no_grad():  # else every box is as large as the image
                model.rpn_head.rpn_reg.weight *= 0.1
                model.roi_head.bbox_head.fc_reg.weight *= 0.1
        cfg.dump(folder / f'{path.stem}_demo.py')
        torch.save(
            dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)),
            folder / f'{path.stem}.pth',
        )
        made[task] = (model, folder / f'{path.stem}_demo.py', folder / f'{path.stem}.pth')
    return made


def noise(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def run_onnx(path, image):
    session = onnxruntime.InferenceSession(path)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {'image': image}), strict=True))


@tasks
@pytest.mark.parametrize('format', ['onnx', 'torch', 'openvino'])
def test_every_format_of_every_task(models, task, format, tmp_path):
    model, _, _ = models[task]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = tmp_path / f'model{FORMATS[format].suffix}'
    info = export(model, path, format, size=SIZE, dynamic=True, preprocess=format == 'onnx')
    verdict = verify(model, path, [noise(*SIZE), noise(64, 64), noise(70, 101, seed=1)])
    assert verdict.explained, verdict.text
    assert info['classes'] == list(model.dataset_meta['classes'])
    # the model stays as it was
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # and the proof can fail
    other = randomize(fastvit_mm.init_model(model.cfg), seed=1)
    assert not verify(other, path, [noise(*SIZE)]).explained
