"""Checks of a built data set by names alone: nothing is decoded."""

import os
from collections.abc import Iterator
from contextlib import suppress

from mmengine.dataset import BaseDataset, InfiniteSampler
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from .problems import Problem, settle, settle_once
from .reading import guard, leaves
from .sets import datasets_in, is_local

#: A sample's files, and the names of their folders in the config's ``data_prefix``.
FILES = {'img_path': ('img_path', 'img'), 'seg_map_path': ('seg_map_path', 'seg')}


def name_problems(dataset: BaseDataset) -> Iterator[Problem]:
    """A data set without images, files that are missing and files outside its folders."""
    if not len(dataset):
        yield nothing_in(dataset)
        return
    # A data set that lists its own folder does not name files that are missing.
    first = dataset.get_data_info(0)
    if not (dataset.ann_file or first.get('seg_map_path')) or not is_local(dataset):
        return
    folders = {key: Folders(roots(dataset, prefixes)) for key, prefixes in FILES.items()}
    for index in range(len(dataset)):
        sample = dataset.get_data_info(index)
        for key, known in folders.items():
            path = sample.get(key)
            if isinstance(path, str) and '://' not in path:
                yield from known.problems(path)


def roots(dataset: BaseDataset, prefixes: tuple[str, ...]) -> list[str]:
    return [dataset.data_prefix[name] for name in prefixes if dataset.data_prefix.get(name)]


class Folders:
    """The names in each folder of a data set, listed once.

    Args:
        inside: the folders in which all its files must be.
    """

    def __init__(self, inside: list[str]):
        self.inside = inside
        self.names: dict[str, set[str]] = {}
        self.outside: dict[str, str | None] = {}

    def problems(self, path: str) -> Iterator[Problem]:
        folder, name = os.path.split(os.path.normpath(path))
        if folder not in self.names:
            self.names[folder] = listed(folder)
            self.outside[folder] = next((r for r in self.inside if leaves_root(folder, r)), None)
        if root := self.outside[folder]:
            yield Problem(path, f'lies outside {root}, the folder of the data set')
        # a file system may take other spellings of a name than the one it lists
        elif name not in self.names[folder] and not os.path.lexists(path):
            yield Problem(path, 'does not exist')


def listed(folder: str) -> set[str]:
    return set(os.listdir(folder or '.')) if os.path.isdir(folder or '.') else set()


def leaves_root(folder: str, root: str) -> bool:
    return os.path.relpath(folder or '.', root).split(os.sep)[0] == os.pardir


def where(dataset: Dataset) -> str:
    """What to call a data set: its list of annotations, or the folder of its images."""
    if not isinstance(dataset, BaseDataset):
        return type(dataset).__name__
    prefix = dataset.data_prefix
    folder = prefix.get('img_path') or prefix.get('img') or dataset.data_root
    return str(dataset.ann_file or folder)


def nothing_in(dataset: BaseDataset) -> Problem:
    why = ' with objects of the classes' if dataset.filter_cfg else ''
    if getattr(dataset, 'img_suffix', None) and not dataset.ann_file:
        why = f': no file ends in {dataset.img_suffix}'
    return Problem(where(dataset), f'gives no images{why}')


def loader_problems(loader: DataLoader) -> Iterator[Problem]:
    """Those of its data sets, and too few images for a single batch."""
    for one in leaves(loader.dataset):
        if isinstance(one, BaseDataset):
            yield from name_problems(one)
    batches = loader.batch_sampler
    if isinstance(loader.dataset, IterableDataset) or not isinstance(batches, BatchSampler):
        return
    endless = isinstance(getattr(batches, 'sampler', None), InfiniteSampler)
    if len(loader.dataset) and not endless and not len(batches):
        wrong = (
            f'gives {len(loader.dataset)} images, fewer than a batch of {batches.batch_size} on '
            'each process: lower batch_size or set drop_last=False'
        )
        yield Problem(where(next(leaves(loader.dataset))), wrong)


def build(loader: dict, *args, **kwargs) -> DataLoader:
    """mmengine's, which fails at a data set without images.

    Raises:
        FastViTError: names that data set.
    """
    try:
        return Runner.build_dataloader(loader, *args, **kwargs)
    except Exception:
        for one in datasets_in(loader):
            found = []
            with suppress(Exception):  # what failed above says more
                dataset = DATASETS.build({**one, 'serialize_data': False, 'pipeline': []})
                found = [nothing_in(dataset)] if not len(dataset) else []
            settle(found)
        raise


def build_checked(*args, **kwargs) -> DataLoader:
    """A loader whose data sets are sound, as far as names tell, and which names bad files.

    Raises:
        FastViTError: a file is missing, or there are fewer images than a batch takes.
    """
    loader = build(*args, **kwargs)
    settle_once(lambda: loader_problems(loader))
    guard(loader.dataset)
    return loader
