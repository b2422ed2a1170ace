"""What a config says about its data sets, looked up before anything is built."""

import inspect
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from fastvit_mm.errors import FastViTError

from .class_folders import label_problems
from .problems import Problem, settle_once
from .sets import datasets_of, kind_of

#: Those that read the folder which is named as their split; most read a list of that name.
SPLIT_IS_FOLDER = ('ImageNet', 'ImageNet21k', 'FreiHAND')


def expected_paths(dataset: dict) -> list[str]:
    """Files and folders under its root that a data set's config names."""
    named = getattr(dataset['type'], '__name__', dataset['type']).rpartition('.')[2]
    split = dataset.get('split') if named in SPLIT_IS_FOLDER else None
    prefix = dataset.get('data_prefix') or split or ''
    parts = list(prefix.values()) if isinstance(prefix, dict) else [prefix]
    return [p for p in [*parts, dataset.get('ann_file')] if p and isinstance(p, str | Path)]


def downloads(dataset: dict, scope: str) -> bool:
    """Whether a data set fetches what is missing, as mmpretrain's CIFAR10 does."""
    kind = kind_of(dataset, scope)
    return bool(kind) and 'download' in inspect.signature(kind).parameters


def check_paths(cfg: Config, *stages: str) -> None:
    """Fail early, with a helpful message, if a data set is missing.

    Args:
        stages: any of train, val, test.

    Raises:
        FastViTError: says what was expected where.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    found = [one for one in datasets_of(cfg, *stages) if one.get('data_root')]
    for dataset in found:
        root = Path(dataset['data_root'])
        paths = [root, *(root / p for p in expected_paths(dataset))]
        missing = [p for p in paths if not p.exists()]
        if missing and not downloads(dataset, scope):
            same_root = [d for d in found if d['data_root'] == dataset['data_root']]
            layout = dict.fromkeys(str(p) for d in same_root for p in expected_paths(d))
            kind = getattr(dataset['type'], '__name__', dataset['type'])
            raise FastViTError(
                f'data set not found: {missing[0]} is missing; {kind} expects '
                f'{", ".join(layout)} under {root.resolve()}; see docs/data.md, '
                'or add --demo to run on generated data'
            )


def check_data(cfg: Config, *stages: str) -> None:
    """Fail early if a data set is missing or its folders are not the config's classes.

    Args:
        stages: any of train, val, test.

    Raises:
        FastViTError: names the first folder or file that would stop the run.
    """
    settle_once(lambda: problems(cfg, *stages))


def problems(cfg: Config, *stages: str) -> Iterator[Problem]:
    check_paths(cfg, *stages)
    if cfg.get('default_scope') == 'mmpretrain':
        yield from label_problems(datasets_of(cfg, *stages))
