"""Models and predictions in two calls, whatever the task; the packages' own APIs do the work."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from . import weights
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
    """Build the model of a config of mmpretrain, mmdet or mmseg, in eval mode.

    Args:
        config: a file or a Config.
        checkpoint: file, address or short name of weights of any layout, loaded strictly; or an
            exported file (.onnx, .pt2, .xml), which then answers; None leaves the model as
            initialized.
        reparam: give the deploy form.
        cfg_options: settings to change, as ``{'model.backbone.arch': 't8'}``.

    Raises:
        FastViTError: a file that does not exist or does not fit; nothing to reparameterize.
    """
    if not isinstance(config, Config):
        if not Path(config).is_file():
            raise FastViTError(f'config {config} does not exist')
        config = Config.fromfile(config)
    else:
        config = copy.deepcopy(config)
    config.merge_from_dict(cfg_options or {})
    weights.drop_pretrained(config.model)
    config.model.pop('teacher', None)
    scope = config.get('default_scope')
    if scope == 'mmpretrain':
        from mmpretrain import get_model

        from . import transforms  # noqa: F401  (a config's own custom_imports replace ours)

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
        raise FastViTError(f'default_scope {scope!r} is none of mmpretrain, mmdet, mmseg')
    meta = dataset_meta(config, scope)
    exported = is_exported(checkpoint)
    if exported and reparam:
        raise FastViTError(f'{checkpoint} has merged branches already: leave out reparam')
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
    """Class names and colours of a config's test set: the data set's own, or set in the config."""
    dataset = (config.get('test_dataloader') or {}).get('dataset', {})
    while 'dataset' in dataset:  # a wrapper such as RepeatDataset
        dataset = dataset['dataset']
    with DATASETS.switch_scope_and_registry(scope) as registry:
        kind = registry.get(dataset['type']) if 'type' in dataset else None
    return {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}


def inference(model: nn.Module, images: Images):
    """Predictions of a model from :func:`init_model`.

    Args:
        images: a path or a BGR uint8 array (H, W, 3), or a list of either.

    Returns:
        What the model's package gives for one image (mmpretrain: a dict with ``pred_label``,
        ``pred_score``, ``pred_class``; mmdet: DetDataSample; mmseg: SegDataSample; of a hand mesh
        model a HandSample), or a list.
    """
    many = isinstance(images, list | tuple)
    items = [str(i) if isinstance(i, Path) else i for i in (images if many else [images])]
    scope = model.cfg.default_scope
    with DefaultScope.overwrite_default_scope(scope):
        if scope == 'mmpretrain':
            from mmpretrain.apis import ImageClassificationInferencer

            device = next(model.parameters()).device
            results = ImageClassificationInferencer(model, device=device)(items)
        elif scope == 'mmdet':
            from mmdet.apis import inference_detector

            results = [on_own_config(inference_detector, model, i) for i in items]
        elif model.cfg.model.type == 'HandMesh':
            from .hand_mesh.inference import infer_hand

            results = [infer_hand(model, i) for i in items]
        else:
            from mmseg.apis import inference_model

            results = [on_own_config(inference_model, model, i) for i in items]
    return results if many else results[0]


def on_own_config(infer, model: nn.Module, image):
    """One image by a package's function, which changes ``model.cfg`` to suit arrays or paths."""
    config = model.cfg
    model.cfg = copy.deepcopy(config)
    try:
        return infer(model, image)
    finally:
        model.cfg = config
