"""What a config says about its data sets, looked up before anything is built."""

from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict

from fastvit_mm.errors import FastViTError

from .class_folders import label_problems
from .problems import settle


def datasets_in(node) -> Iterator[ConfigDict]:
    """Every data set in a dataloader's config, including those in wrappers (RepeatDataset)."""
    if isinstance(node, list | tuple):
        for child in node:
            yield from datasets_in(child)
    elif isinstance(node, dict):
        if 'data_root' in node:
            yield node
        for key in ('dataset', 'datasets'):
            yield from datasets_in(node.get(key))


def datasets_of(cfg: Config, *stages: str) -> list[ConfigDict]:
    return [d for s in stages for d in datasets_in(cfg.get(f'{s}_dataloader'))]


def expected_paths(dataset: dict) -> list[str]:
    """Files and folders under its root that a data set's config names."""
    prefix = dataset.get('data_prefix') or dataset.get('split') or ''
    parts = list(prefix.values()) if isinstance(prefix, dict) else [prefix]
    return [p for p in [*parts, dataset.get('ann_file')] if p]


def check_paths(cfg: Config, *stages: str) -> None:
    """Fail early, with a helpful message, if a data set is missing.

    Args:
        stages: any of train, val, test.

    Raises:
        FastViTError: says what was expected where.
    """
    found = datasets_of(cfg, *stages)
    for dataset in found:
        root = Path(dataset['data_root'])
        paths = [root, *(root / p for p in expected_paths(dataset))]
        if missing := [p for p in paths if not p.exists()]:
            same_root = [d for d in found if d['data_root'] == dataset['data_root']]
            layout = dict.fromkeys(p for d in same_root for p in expected_paths(d))
            raise FastViTError(
                f'data set not found: {missing[0]} is missing; {dataset["type"]} expects '
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
    check_paths(cfg, *stages)
    if cfg.get('default_scope') == 'mmpretrain':
        settle(label_problems(datasets_of(cfg, *stages)))
