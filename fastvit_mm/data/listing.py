"""Checks of a built data set by names alone: nothing is decoded."""

import os
from collections.abc import Iterator

from mmengine.dataset import BaseDataset, InfiniteSampler
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from .paths import datasets_in
from .problems import Problem, settle
from .reading import guard, leaves

#: A sample's files, and the names of their folders in the config's ``data_prefix``.
FILES = {'img_path': ('img_path', 'img'), 'seg_map_path': ('seg_map_path', 'seg')}


def name_problems(dataset: BaseDataset) -> Iterator[Problem]:
    """A data set without images, files that are missing and files outside its folders."""
    if not len(dataset):
        yield nothing_in(dataset)
        return
    # A data set that lists its own folder does not name files that are missing.
    first = dataset.get_data_info(0)
    if not (dataset.ann_file or first.get('seg_map_path')):
        return
    folders: dict[str, set[str]] = {}
    for index in range(len(dataset)):
        sample = dataset.get_data_info(index)
        for key, prefixes in FILES.items():
            path = sample.get(key)
            if isinstance(path, str) and '://' not in path:
                yield from file_problems(path, roots(dataset, prefixes), folders)


def roots(dataset: BaseDataset, prefixes: tuple[str, ...]) -> list[str]:
    return [dataset.data_prefix[name] for name in prefixes if dataset.data_prefix.get(name)]


def file_problems(path: str, inside: list[str], folders: dict[str, set[str]]) -> Iterator[Problem]:
    """Args: ``folders`` keeps the names in each folder."""
    whole = os.path.normpath(path)
    for root in inside:
        if not whole.startswith(os.path.normpath(root) + os.sep):
            yield Problem(path, f'lies outside {root}, the folder of the data set')
            return
    folder, name = os.path.split(whole)
    if folder not in folders:
        folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if name not in folders[folder]:
        yield Problem(path, 'does not exist')


def where(dataset: BaseDataset) -> str:
    """What to call a data set: its list of annotations, or the folder of its images."""
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
    endless = isinstance(batches.sampler, InfiniteSampler)
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
            dataset = DATASETS.build({**one, 'serialize_data': False, 'pipeline': []})
            if not len(dataset):
                settle([nothing_in(dataset)])
        raise


def build_checked(*args, **kwargs) -> DataLoader:
    """A loader whose data sets are sound, as far as names tell, and which names bad files.

    Raises:
        FastViTError: a file is missing, or there are fewer images than a batch takes.
    """
    loader = build(*args, **kwargs)
    settle(loader_problems(loader))
    guard(loader.dataset)
    return loader
