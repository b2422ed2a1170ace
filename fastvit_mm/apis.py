"""Models and predictions in two calls, for every task; the packages' own APIs do the work."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, DefaultScope

from . import configs, settings, weights
from .data import explain
from .errors import FastViTError
from .export import attach, is_exported
from .reparameterize import reparameterize

Images = str | Path | np.ndarray | Sequence[str | Path | np.ndarray]


def init_model(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str = 'cpu',
    reparam: bool = False,
    cfg_options: dict | None = None,
) -> nn.Module:
    """Build the model of an mmpretrain, mmdet or mmseg config, in eval mode.

    Args:
        config: a file, ``fastvit_mm::<task>/<name>`` or a Config.
        checkpoint: file, URL or short name of weights in any layout, loaded strictly; or an
            exported file (.onnx, .pt2, .xml), which then computes the predictions; None keeps
            the initial weights.
        reparam: return the deploy form.
        cfg_options: settings to change, such as ``{'model.backbone.arch': 't8'}``.

    Raises:
        FastViTError: a file does not exist or does not fit, or there is nothing to
            reparameterize; a setting is wrong.
    """
    if not isinstance(config, Config):
        config = Config.fromfile(configs.find(str(config)))
    else:
        config = copy.deepcopy(config)
    scope = config.get('default_scope')
    if scope == 'mmpretrain':
        from . import transforms  # noqa: F401  (a config's own custom_imports replace ours)
    settings.check(config, settings.merge(config, cfg_options or {}), settings.PREDICT)
    weights.drop_pretrained(config.model)
    config.model.pop('teacher', None)
    if scope == 'mmpretrain':
        from mmpretrain import get_model

        model = get_model(config, device=device)
    elif scope == 'mmdet':
        from mmdet.apis import init_detector

        model = init_detector(config, device=device, cfg_options={})
    elif scope == 'mmseg':
        from mmseg.apis import init_model as init_segmentor

        model = init_segmentor(config, device=device)
    elif config.model.type == 'HandMesh':
        from .hand_mesh.inference import init_hand_mesh

        model = init_hand_mesh(config, device)
    else:
        raise FastViTError(f'default_scope {scope!r} is not one of mmpretrain, mmdet, mmseg')
    meta = dataset_meta(config, scope)
    exported = is_exported(checkpoint)
    if exported and reparam:
        raise FastViTError(f'{checkpoint} is already merged: leave out reparam')
    if checkpoint is not None and not exported:
        read = weights.load(model, checkpoint, whole=True)
        meta = read['meta'].get('dataset_meta') or meta
    if meta:
        model.dataset_meta = model._dataset_meta = meta
    model.cfg = config
    model.eval()
    if exported:
        return attach(model, checkpoint)
    return reparameterize(model) if reparam else model


def dataset_meta(config: Config, scope: str) -> dict:
    """Class names and colours of a config's test set: the data set's, or those in the config."""
    dataset = (config.get('test_dataloader') or {}).get('dataset', {})
    while 'dataset' in dataset:  # a wrapper such as RepeatDataset
        dataset = dataset['dataset']
    with DATASETS.switch_scope_and_registry(scope) as registry:
        kind = registry.get(dataset['type']) if 'type' in dataset else None
    return {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}


def inference(model: nn.Module, images: Images):
    """Predict with a model from :func:`init_model`.

    Args:
        images: a path or a BGR uint8 array (H, W, 3), or a list of either.

    Returns:
        What the model's package returns for an image (mmpretrain: a dict with ``pred_label``,
        ``pred_score``, ``pred_class``; mmdet: DetDataSample; mmseg: SegDataSample; for a hand mesh
        model a HandSample), or a list.

    Raises:
        FastViTError: an image cannot be read; names the file.
    """
    many = isinstance(images, list | tuple)
    items = [str(i) if isinstance(i, Path) else i for i in (images if many else [images])]
    for item in items:
        if isinstance(item, str) and '://' not in item and not Path(item).is_file():
            raise FastViTError(f'image {item} does not exist')
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope), torch.no_grad():
        predict = predictor(model)
        results = [predict_one(predict, item) for item in items]
    return results if many else results[0]


def predict_one(predict: Callable, item: str | np.ndarray):
    try:
        return predict(item)
    except Exception as error:
        known = explain(error, dict(img_path=item)) if isinstance(item, str) else None
        if known is None or known is error:
            raise
        raise known from error


def predictor(model: nn.Module) -> Callable:
    """A callable that predicts for one image, built once and kept with the model."""
    kept = model.__dict__.get('_predictor')
    if kept is None or kept.config is not model.cfg:
        if model.cfg.model.type == 'HandMesh':
            kind = ByHandMesh
        else:
            kind = ByInferencer if model.cfg.default_scope == 'mmpretrain' else ByPipeline
        kept = model._predictor = kind(model)
    return kept


class ByInferencer:
    """Predicts with mmpretrain's inferencer."""

    def __init__(self, model: nn.Module):
        from mmpretrain.apis import ImageClassificationInferencer

        self.config = model.cfg
        self.inferencer = ImageClassificationInferencer(model)

    def __call__(self, image) -> dict:
        inferencer = self.inferencer
        inferencer.classes = inferencer.model._dataset_meta.get('classes')
        # what calling it does, without the progress bar
        (batch,) = inferencer.preprocess([image])
        return inferencer.postprocess(inferencer.forward(batch), [])[0]


class ByPipeline:
    """Predicts like mmdet's and mmseg's functions, which rebuild the test pipeline per image."""

    def __init__(self, model: nn.Module):
        self.config, self.model = model.cfg, model
        steps = model.cfg.get('test_pipeline') if model.cfg.default_scope == 'mmseg' else None
        steps = steps or model.cfg.test_dataloader.dataset.pipeline
        steps = [dict(s) for s in steps if not s['type'].endswith('LoadAnnotations')]
        self.from_path = Compose(steps)
        self.from_array = Compose([steps[0] | dict(type='LoadImageFromNDArray'), *steps[1:]])

    def __call__(self, image):
        if isinstance(image, np.ndarray):
            data = self.from_array(dict(img=image, img_id=0))
        else:
            data = self.from_path(dict(img_path=image, img_id=0))
        return self.model.test_step(pseudo_collate([data]))[0]


class ByHandMesh:
    """By :func:`fastvit_mm.hand_mesh.inference.infer_hand`."""

    def __init__(self, model: nn.Module):
        self.config, self.model = model.cfg, model

    def __call__(self, image):
        from .hand_mesh.inference import infer_hand

        return infer_hand(self.model, image)
