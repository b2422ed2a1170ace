"""Models and predictions in two calls, for every task; the packages' own APIs do the work."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, DefaultScope

from . import configs, noise, settings, weights
from .data import explain
from .errors import FastViTError
from .export import attach, is_exported
from .reparameterize import reparameterize

WAITING = 4  # batches' images that wait for others of their size, at most
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

        with noise.without('checkpoint is None, use COCO classes'):  # ours follow
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
    texts = getattr(getattr(model, 'head', None), 'class_names', None)
    if texts is not None:  # a zero-shot head knows its classes, and has none without texts
        meta = dict(classes=texts)
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


def inference(model: nn.Module, images: Images, batch_size: int = 8):
    """Predict with a model from :func:`init_model`.

    Args:
        images: a path or a BGR uint8 array (H, W, 3), or a list of either.
        batch_size: of a list, so many at a time, at most; images are computed together if they
            have the same size after the config's resizing, so that none is padded. The results
            don't depend on it.

    Returns:
        What the model's package returns for an image (mmpretrain: a dict with ``pred_label``,
        ``pred_score``, ``pred_class``, or with ``embedding``; mmdet: DetDataSample; mmseg:
        SegDataSample; for a hand mesh model a HandSample), or a list in the order of
        the images.

    Raises:
        FastViTError: an image cannot be read; names the file. A ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise FastViTError(f'batch_size={batch_size}: at least 1')
    many = isinstance(images, list | tuple)
    items = [str(i) if isinstance(i, Path) else i for i in (images if many else [images])]
    for item in items:
        if isinstance(item, str) and '://' not in item and not Path(item).is_file():
            raise FastViTError(f'image {item} does not exist')
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope), torch.no_grad():
        results = in_batches(predictor(model), items, batch_size)
    return results if many else results[0]


def in_batches(predict: 'Predictor', items: list, batch_size: int) -> list:
    """Predictions in the order of ``items``, computed with others of the same size."""
    results, waiting = [None] * len(items), {}

    def compute(size):
        indices, samples = zip(*waiting.pop(size), strict=True)
        for index, result in zip(indices, predict.compute(list(samples)), strict=True):
            results[index] = result

    for index, item in enumerate(items):
        sample = prepare_one(predict, item)
        size = predict.size(sample)
        waiting.setdefault(size, []).append((index, sample))
        if len(waiting[size]) == batch_size:
            compute(size)
        elif sum(map(len, waiting.values())) > WAITING * batch_size:
            compute(next(iter(waiting)))  # the oldest: memory is bounded
    while waiting:
        compute(next(iter(waiting)))
    return results


def prepare_one(predict: 'Predictor', item: str | np.ndarray) -> dict:
    try:
        return predict.prepare(item)
    except Exception as error:
        known = explain(error, dict(img_path=item)) if isinstance(item, str) else None
        if known is None or known is error:
            raise
        raise known from error


def predictor(model: nn.Module) -> 'Predictor':
    """What predicts with ``model``, built once and kept with it."""
    kept = model.__dict__.get('_predictor')
    if kept is None or kept.config is not model.cfg:
        if model.cfg.model.type == 'HandMesh':
            kind = ByHandMesh
        else:
            kind = ByInferencer if model.cfg.default_scope == 'mmpretrain' else ByPipeline
        kept = model._predictor = kind(model)
    return kept


class Predictor:
    """Prepares images one by one, and computes those that have the same size together."""

    def __init__(self, model: nn.Module):
        self.config, self.model = model.cfg, model

    def prepare(self, image: str | np.ndarray) -> dict:
        """The output of the config's pipeline, before it is collated."""
        raise NotImplementedError

    def size(self, sample: dict):
        return sample['inputs'].shape

    def compute(self, samples: list[dict]) -> list:
        return self.model.test_step(pseudo_collate(samples))


class ByInferencer(Predictor):
    """Predicts with mmpretrain's inferencer."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        from mmpretrain.apis import ImageClassificationInferencer

        self.inferencer = ImageClassificationInferencer(model)

    # What calling it does, without the progress bar.
    def prepare(self, image) -> dict:
        (batch,) = self.inferencer.preprocess([image])
        return batch

    def compute(self, samples: list[dict]) -> list[dict]:
        inferencer = self.inferencer
        inferencer.classes = inferencer.model._dataset_meta.get('classes')
        batch = dict(
            inputs=torch.cat([one['inputs'] for one in samples]),
            data_samples=[sample for one in samples for sample in one['data_samples']],
        )
        found = inferencer.forward(batch)
        if 'embedding' in found[0]:
            return [dict(embedding=one.embedding.float().cpu().numpy()) for one in found]
        return inferencer.postprocess(found, [])


class ByPipeline(Predictor):
    """Predicts like mmdet's and mmseg's functions, which rebuild the test pipeline per image."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        steps = model.cfg.get('test_pipeline') if model.cfg.default_scope == 'mmseg' else None
        steps = steps or model.cfg.test_dataloader.dataset.pipeline
        steps = [dict(s) for s in steps if not s['type'].endswith('LoadAnnotations')]
        self.from_path = Compose(steps)
        self.from_array = Compose([steps[0] | dict(type='LoadImageFromNDArray'), *steps[1:]])

    def prepare(self, image) -> dict:
        if isinstance(image, np.ndarray):
            return self.from_array(dict(img=image, img_id=0))
        return self.from_path(dict(img_path=image, img_id=0))

    def size(self, sample: dict):
        # mmseg computes windows for the first original of a batch
        return *sample['inputs'].shape, *sample['data_samples'].ori_shape


class ByHandMesh(Predictor):
    """By the functions of :mod:`fastvit_mm.hand_mesh.inference`."""

    def prepare(self, image) -> dict:
        from .hand_mesh.inference import prepare

        return prepare(self.model, image)

    def compute(self, samples: list[dict]) -> list:
        from .hand_mesh.inference import compute

        return compute(self.model, samples)
