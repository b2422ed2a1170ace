"""MobileCLIP's embeddings of images, and classification by those of texts, in mmpretrain."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

from .errors import FastViTError
from .reparameterize import network


@MODELS.register_module()
class ZeroShotHead(ClsHead):
    """Gives the neck's embeddings, (B, D), or compares them with those of texts, (B, K) logits.

    The logits are ``scale`` times the cosine, -1 to 1. There is nothing to train.

    Args:
        texts: a ``.safetensors`` with ``embeddings`` (K, D) and, in its metadata, ``names``: a
            JSON list of K class names. None: predictions are ``embedding`` (D,), not normalized.
        scale: CLIP's logit scale, 100 in all published models.

    Raises:
        FastViTError: the file of texts is not one.
    """

    def __init__(self, texts: str | Path | None = None, scale: float = 100.0, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        names, embeddings = read_texts(texts) if texts else ((), None)
        self.class_names, self.scale = tuple(names), scale
        self.order = list(range(len(names)))
        directions = None if embeddings is None else F.normalize(embeddings.float(), dim=1)
        self.register_buffer('texts', directions, persistent=False)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def forward(self, feats: tuple[Tensor]) -> Tensor:
        x = feats[-1]
        if self.texts is None:
            return x
        if x.shape[1] != self.texts.shape[1]:
            raise FastViTError(
                f'the texts have embeddings of {self.texts.shape[1]}, the images of {x.shape[1]}: '
                'make those of the texts with the text tower of the same model'
            )
        return self.scale * F.normalize(x, dim=1) @ self.texts.T.to(x)

    def _get_predictions(self, cls_score, data_samples):
        return super()._get_predictions(cls_score[:, self.order], data_samples)

    def loss(self, feats, data_samples, **kwargs):
        raise FastViTError('a ZeroShotHead has nothing to train: take a LinearClsHead')

    def predict(self, feats, data_samples=None) -> list[DataSample]:
        if self.texts is not None:
            return super().predict(feats, data_samples)
        found = self(feats)
        samples = data_samples if data_samples is not None else [None] * len(found)
        samples = [DataSample() if s is None else s for s in samples]
        for sample, embedding in zip(samples, found, strict=True):
            sample.set_field(embedding, 'embedding', dtype=Tensor)
        return samples


@HOOKS.register_module()
class ZeroShotTestHook(Hook):
    """Before a test, compare the names of a :class:`ZeroShotHead` with the data set's classes.

    If these are in another order, the predictions follow them, which is logged, as are other words.

    Raises:
        FastViTError: the head has no texts, or texts of other classes.
    """

    def before_test(self, runner: Runner) -> None:
        model = network(runner.model)
        names = (getattr(model, 'dataset_meta', None) or {}).get('classes')  # of an exported file
        names = names or model.head.class_names
        if not names:
            raise FastViTError(
                'a test of embeddings needs texts to compare them with: --cfg-options '
                'model.head.texts=FILE (docs/family.md)'
            )
        classes = (runner.test_dataloader.dataset.metainfo or {}).get('classes')
        if not classes:
            return
        model.head.order = order_of(names, classes)
        if tuple(names) != tuple(classes):
            same = set(names) == set(classes)
            runner.logger.info(
                "the texts have the data set's names in another order: sorted"
                if same
                else "the names of some texts are not the data set's: taken in their order"
            )


def order_of(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """For each class of a data set, the number of its text.

    Raises:
        FastViTError: the names are not those of the classes, nor other words for them in order.
    """
    names, classes = list(names), list(classes)
    if len(names) != len(classes):
        raise FastViTError(
            f'{len(names)} texts for the {len(classes)} classes of the data set: make a file of '
            'texts with its classes (docs/family.md)'
        )
    if set(names) == set(classes) and len(set(names)) == len(names):
        return [names.index(name) for name in classes]
    moved = [name for name in set(names) & set(classes) if names[classes.index(name)] != name]
    if moved:
        name = min(moved)
        raise FastViTError(
            f'the text {name!r} is where the data set has {classes[names.index(name)]!r}: make a '
            'file of texts with its classes in their order (docs/family.md)'
        )
    return list(range(len(names)))


def read_texts(path: str | Path) -> tuple[list[str], Tensor]:
    """Names (K) and embeddings (K, D) of a file of texts.

    Raises:
        FastViTError: it is not such a file.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise FastViTError(f'{path} needs safetensors: pip install safetensors') from error
    if not Path(path).is_file():
        raise FastViTError(f'texts {path} do not exist: docs/family.md says how to make them')
    try:
        with safe_open(path, 'pt') as file:
            names = json.loads((file.metadata() or {})['names'])
            embeddings = file.get_tensor('embeddings')
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FastViTError(
            f'{path} has no embeddings with names: {error}; docs/family.md says how to make them'
        ) from error
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not fits or embeddings.ndim != 2 or len(embeddings) != len(names):
        shape = tuple(embeddings.shape)
        raise FastViTError(
            f'{path}: expected a vector for each name, got {shape} for {names}'[:300]
        )
    if not torch.isfinite(embeddings).all():
        raise FastViTError(f'{path} has vectors that are NaN or infinite')
    return names, embeddings
