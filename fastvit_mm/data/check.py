"""Everything that is wrong with the data sets of a config, every image read."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmcv.transforms import LoadAnnotations
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader, Dataset

from fastvit_mm.errors import FastViTError, one_line
from fastvit_mm.failures import root_cause, without_traceback
from fastvit_mm.opencv import without_threads

from .class_folders import label_problems, layouts
from .listing import build, loader_problems, where
from .paths import check_paths
from .problems import LEVELS, NOTE, SPOILS, STOPS, Problem
from .reading import ClassIds, guard, leaves, orientation
from .sets import datasets_in, datasets_of, is_local, kind_of

STAGES = ('train', 'val', 'test')
UNLABELLED = 'has no labelled pixel'
BATCH = 8
SHOWN = 20  # problems of each kind in a printed report


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

    def as_json(self) -> dict:
        return dict(images=self.images, problems=[asdict(one) for one in self.problems])

    def __str__(self) -> str:
        """A line for each problem, the worst first, and a last one that counts them."""
        kinds, lines = defaultdict(list), []
        for one in self.problems:
            kinds[LEVELS.index(one.level), one.then].append(one)
        for (level, then), problems in sorted(kinds.items(), key=lambda kind: kind[0][0]):
            lines += [f'{LEVELS[level]}: {one}: {then}' for one in problems[:SHOWN]]
            if (more := len(problems) - SHOWN) > 0:
                lines.append(f'{LEVELS[level]}: {more} more of this kind: {then}')
        read = '; '.join(f'{number} images of {stages}' for stages, number in self.images.items())
        numbers = [sum(one.level == level for one in self.problems) for level in LEVELS]
        words = (('that stops', 'that stop'), ('that spoils', 'that spoil'), ('note', 'notes'))
        counted = ', '.join(f'{n} {w[n != 1]}' for n, w in zip(numbers, words, strict=True))
        found = counted if self.problems else 'nothing is wrong'
        return '\n'.join([*lines, f'read {read or "no images"}: {found}'])


class Reader(Dataset):
    """Sample by sample, what is wrong with its files; runs the data set's own pipeline."""

    def __init__(self, dataset):
        self.dataset = dataset
        steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
        self.ids = next((step for step in steps if isinstance(step, ClassIds)), None)
        self.masks = next((step for step in steps if isinstance(step, LoadAnnotations)), None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[Problem]:
        if not isinstance(self.dataset, BaseDataset):
            return self.of_own(index)
        sample = self.dataset.get_data_info(index)
        image = str(sample.get('img_path'))
        try:
            self.dataset.pipeline(sample)
        except FastViTError as error:
            return [as_problem(error, image)]
        except RuntimeError as error:
            return [Problem(image, f'cannot be used: {one_line(error)}')]
        return list(self.notes(self.dataset.get_data_info(index), image))

    def of_own(self, index: int) -> list[Problem]:
        """Of a sample of a class that is none of OpenMMLab's, in which all may be otherwise."""
        try:
            self.dataset[index]
        except Exception as error:
            found = root_cause(error) or FastViTError(f'{type(error).__name__}: {one_line(error)}')
            return [as_problem(found, f'{where(self.dataset)}, sample {index}')]
        return []

    def notes(self, sample: dict, image: str) -> Iterator[Problem]:
        """What a run takes as it is, though it may not be meant."""
        placed = sample.get('seg_map_path') or sample.get('instances')
        if placed and orientation(image) != 1:
            then = 'its boxes and masks must be those of the upright photo'
            yield Problem(image, 'is turned upright by its EXIF data', then, NOTE)
        if sample.get('seg_map_path') and self.ids:
            mask = self.masks(sample)['gt_seg_map']
            if not (mask != self.ids.ignore).any():
                path = sample['seg_map_path']
                yield Problem(path, UNLABELLED, 'nothing is learned or measured there', NOTE)


def as_problem(error: FastViTError, file: str) -> Problem:
    what = error.args[0]
    if isinstance(what, Problem):
        return what
    return Problem(str(file), f'cannot be used: {without_traceback(error)}')


def read(dataset, workers: int, advance: Callable[[int], None]) -> Iterator[Problem]:
    """Read every sample of a data set in ``workers`` processes, in order."""
    reader = Reader(dataset)
    loader = DataLoader(reader, batch_size=BATCH, num_workers=workers, collate_fn=list)
    empty = 0
    with without_threads():
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
    suffix = getattr(dataset, 'seg_map_suffix', None)
    if not suffix or not isinstance(dataset, BaseDataset) or not is_local(dataset):
        return
    folder = dataset.data_prefix.get('seg_map_path')
    if not folder or dataset.ann_file:
        return
    used = {Path(dataset.get_data_info(i)['seg_map_path']) for i in range(len(dataset))}
    for path in sorted(set(Path(folder).rglob(f'*{suffix}')) - used):
        wrong = f'belongs to no image ending in {dataset.img_suffix}'
        yield Problem(str(path), wrong, 'it is not used', NOTE)


def annotation_problems(datasets: list[dict]) -> Iterator[Problem]:
    """All problems of COCO's files, of which a run would name the first.

    Files of other formats (LVIS, panoptic) and those that a project reads in its own way are left
    to the run.
    """
    from mmdet.datasets import CocoDataset

    from . import coco

    for one in datasets:
        kind = kind_of(one, 'mmdet')
        usual = kind and issubclass(kind, CocoDataset) and kind.COCOAPI is coco.SoundCOCO
        if not usual or kind.load_data_list is not CocoDataset.load_data_list:
            continue
        if not one.get('ann_file') or not is_local(one):
            continue
        path = Path(one.get('data_root') or '', one['ann_file'])
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            yield Problem(str(path), coco.unreadable(error))
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
                report.add([as_problem(root_cause(error), configs[0].get('data_root') or stages)])
                continue
            report.add(loader_problems(built))
            report.images[stages] = len(built.dataset)
            guard(built.dataset)
            for one in leaves(built.dataset):
                report.add(unused_masks(one))
                advance = progress(stages, len(one)) if progress else lambda _number: None
                report.add(read(one, workers, advance))
    return report
