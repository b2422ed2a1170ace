"""Test-time augmentation by OpenMMLab's models for it."""

from mmengine.config import Config, ConfigDict

from fastvit_mm.data import datasets_in
from fastvit_mm.errors import FastViTError
from fastvit_mm.settings.widths import type_of

#: What averages predictions, by package. mmdet's averages boxes, but no masks.
MODELS = dict(mmpretrain='AverageClsScoreTTA', mmseg='SegTTAModel')


def augment_test(cfg: Config) -> None:
    """Let a test average several predictions: as the config's ``tta_model`` and ``tta_pipeline``
    say, else for the image and its mirror image.

    Raises:
        FastViTError: the config has neither, and nothing averages what its model predicts.
    """
    model, pipeline = cfg.get('tta_model'), cfg.get('tta_pipeline')
    if model is None and cfg.get('default_scope') not in MODELS:
        raise FastViTError(
            '--tta averages classes and class maps; for other predictions, give the config a '
            'tta_model and a tta_pipeline'
        )
    model = model or dict(type=MODELS[cfg.default_scope])
    for dataset in datasets_in(cfg.test_dataloader):
        dataset.pipeline = pipeline or mirrored(dataset.pipeline)
    cfg.model = ConfigDict(**model, module=cfg.model)


def mirrored(pipeline: list[dict]) -> list[dict]:
    """``pipeline`` for an image and for its mirror image; labels stay those of the image."""
    kinds = [str(type_of(step)) for step in pipeline]
    labels = [k.endswith('LoadAnnotations') or k.split('.')[-1].startswith('Pack') for k in kinds]
    first = labels.index(True) if True in labels else len(pipeline)
    rest = [ConfigDict(step) for step in pipeline[first:]]
    for step in rest:
        if 'meta_keys' in step:  # where the package looks whether it has to turn a prediction back
            keys = (*step.meta_keys, 'flip', 'flip_direction')
            step.meta_keys = tuple(dict.fromkeys(keys))
    flips = [dict(type='RandomFlip', prob=chance, direction='horizontal') for chance in (0.0, 1.0)]
    augment = dict(type='TestTimeAug', transforms=[flips, *([step] for step in rest)])
    return [*pipeline[:first], augment]
