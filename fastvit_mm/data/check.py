"""Everything that is wrong with the data sets of a config, every image read."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
from mmcv.transforms import LoadAnnotations
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch.utils.data import DataLoader, Dataset

from fastvit_mm.errors import FastViTError, one_line
from fastvit_mm.failures import root_cause, without_traceback

from .class_folders import label_problems, layouts
from .listing import build, loader_problems, where
from .paths import check_paths, datasets_in, datasets_of
from .problems import NOTE, SPOILS, STOPS, Problem
from .reading import Fit, guard, leaves, orientation

STAGES = ('train', 'val', 'test')
UNLABELLED = 'has no labelled pixel'
BATCH = 8


@dataclass
class Report:
    """What :func:`check` found: images read for each group of stages, and the problems."""

    images: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, found) -> bool:
        """Keep what is new; whether any of it stops a run."""
        found = list(found)
        self.problems = list(dict.fromkeys([*self.problems, *found]))
        return any(one.level == STOPS for one in found)

    @property
    def sound(self) -> bool:
        return all(one.level == NOTE for one in self.problems)


class Reader(Dataset):
    """Sample by sample, what is wrong with its files; runs the data set's own pipeline."""

    def __init__(self, dataset):
        self.dataset = dataset
        steps = dataset.pipeline.transforms
        self.fit = next((step for step in steps if isinstance(step, Fit)), None)
        self.masks = next((step for step in steps if isinstance(step, LoadAnnotations)), None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[Problem]:
        sample = self.dataset.get_data_info(index)
        image = str(sample.get('img_path'))
        try:
            self.dataset.pipeline(sample)
        except FastViTError as error:
            return [as_problem(error, image)]
        except RuntimeError as error:
            return [Problem(image, f'cannot be used: {one_line(error)}')]
        return list(self.notes(self.dataset.get_data_info(index), image))

    def notes(self, sample: dict, image: str) -> Iterator[Problem]:
        """What a run takes as it is, though it may not be meant."""
        placed = sample.get('seg_map_path') or sample.get('instances')
        if placed and orientation(image) != 1:
            then = 'its boxes and masks must be those of the upright photo'
            yield Problem(image, 'is turned upright by its EXIF data', then, NOTE)
        if sample.get('seg_map_path') and self.masks:
            mask = self.masks(sample)['gt_seg_map']
            if not (mask != self.fit.ignore).any():
                path = sample['seg_map_path']
                yield Problem(path, UNLABELLED, 'nothing is learned or measured there', NOTE)


def as_problem(error: FastViTError, file: str) -> Problem:
    what = error.args[0]
    if isinstance(what, Problem):
        return what
    return Problem(str(file), f'cannot be used: {without_traceback(error)}')


def single_threaded(_worker: int) -> None:
    cv2.setNumThreads(0)


def read(dataset, workers: int, advance: Callable[[int], None]) -> Iterator[Problem]:
    """Read every sample of a data set in ``workers`` processes, in order."""
    loader = DataLoader(
        Reader(dataset),
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=single_threaded,
    )
    empty = 0
    for samples in loader:
        found = [one for problems in samples for one in problems]
        empty += sum(one.wrong == UNLABELLED for one in found)
        yield from found
        advance(len(samples))
    if empty and empty == len(dataset):
        then = 'nothing can be learned or measured'
        yield Problem(where(dataset), 'has no labelled pixel in any mask', then, SPOILS)


def strays(scope: str, datasets: list[dict]) -> Iterator[Problem]:
    """Files that nothing reads."""
    if scope == 'mmpretrain':
        for one in layouts(datasets):
            yield from one.strays()


def unused_masks(dataset) -> Iterator[Problem]:
    """mmseg starts from the images: masks of other names go unseen."""
    folder = dataset.data_prefix.get('seg_map_path')
    suffix = getattr(dataset, 'seg_map_suffix', None)
    if not folder or not suffix or dataset.ann_file:
        return
    used = {Path(dataset.get_data_info(i)['seg_map_path']) for i in range(len(dataset))}
    for path in sorted(set(Path(folder).rglob(f'*{suffix}')) - used):
        wrong = f'belongs to no image ending in {dataset.img_suffix}'
        yield Problem(str(path), wrong, 'it is not used', NOTE)


def annotation_problems(datasets: list[dict]) -> Iterator[Problem]:
    """All problems of COCO's files, of which a run would name the first."""
    from mmdet.datasets import CocoDataset

    from . import coco

    with DATASETS.switch_scope_and_registry('mmdet') as registry:
        kinds = [registry.get(one['type']) for one in datasets]
    for one, kind in zip(datasets, kinds, strict=True):
        own = isinstance(kind, type) and issubclass(kind, CocoDataset)
        if not own or not one.get('ann_file'):
            continue
        path = Path(one['data_root'], one['ann_file'])
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            yield Problem(str(path), f'is no JSON: {one_line(error)}')
            continue
        found = list(coco.problems(content, str(path)))
        yield from found
        if all(problem.level != STOPS for problem in found):
            classes = (one.get('metainfo') or {}).get('classes') or kind.METAINFO['classes']
            yield from coco.of_classes(content, classes, str(path))


def groups(cfg: Config) -> dict[str, dict]:
    """The dataloaders of a config by the stages that use them; test is often val."""
    found: dict[str, dict] = {}
    for stage in STAGES:
        loader = cfg.get(f'{stage}_dataloader')
        if loader:
            same = next((k for k, v in found.items() if v.dataset == loader.dataset), None)
            name = f'{same}, {stage}' if same else stage
            found[name] = found.pop(same) if same else loader
    return found


def check(cfg: Config, workers: int = 0, progress: Callable | None = None) -> Report:
    """Read all data sets of a config and list what is wrong.

    Args:
        workers: processes that read; 0 reads in this one.
        progress: called with the stages and the number of images for each data set, gives a
            callable that is called with the number of images just read.

    Raises:
        FastViTError: a data set is not there at all.
    """
    report, scope = Report(), cfg.get('default_scope')
    check_paths(cfg, *STAGES)
    report.add(strays(scope, datasets_of(cfg, *STAGES)))
    if scope == 'mmpretrain' and report.add(label_problems(datasets_of(cfg, *STAGES))):
        return report
    with DefaultScope.overwrite_default_scope(scope):
        for stages, loader in groups(cfg).items():
            configs = list(datasets_in(loader))
            if scope == 'mmdet' and report.add(annotation_problems(configs)):
                continue
            try:
                built = build(loader)
            except FastViTError as error:
                report.add([as_problem(root_cause(error), configs[0]['data_root'])])
                continue
            report.add(loader_problems(built))
            report.images[stages] = len(built.dataset)
            guard(built.dataset)
            for one in leaves(built.dataset):
                report.add(unused_masks(one))
                advance = progress(stages, len(one)) if progress else lambda _number: None
                report.add(read(one, workers, advance))
    return report
