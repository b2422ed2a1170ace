"""Accuracy on images other than those of the validation set."""

import contextlib
import io
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from fastvit_mm.data import check_data, datasets_in
from fastvit_mm.errors import FastViTError
from fastvit_mm.hooks import ReparameterizeHook
from fastvit_mm.reparameterize import unwrap

from .catalogue import CROP, ROOTS, TITLES, Catalogue, published
from .corruption_error import CORRUPTIONS, SEVERITIES
from .demo_sets import demo_catalogue
from .loop import FormsLoop, only_classes
from .sets import (
    ACCURACY,
    ImageSet,
    natural_set,
    real_set,
    regenerated_sets,
    released_sets,
)

FEW = (1, 3, 5)  # severities
TASKS = dict(mmpretrain='classification', mmdet='detection', mmseg='segmentation')
#: Metrics that tables show: their names there, and what makes percent of them.
HEADLINES = {
    'accuracy/top1': ('top-1', 1),
    'real/top1': ('top-1', 1),
    'mIoU': ('mIoU', 1),
    'coco/bbox_mAP': ('box AP', 100),
    'coco/segm_mAP': ('mask AP', 100),
}


@dataclass
class Result:
    """What was measured on a set.

    Attributes:
        metrics: by form of the model, as its package names them.
    """

    name: str
    images: int
    metrics: dict[str, dict[str, float]]

    def headline(self, form: str) -> dict[str, float]:
        """The metrics for tables, in percent."""
        values = self.metrics[form]
        known = {HEADLINES[k][0]: HEADLINES[k][1] * values[k] for k in HEADLINES if k in values}
        return known or dict([next(iter(values.items()))])

    def difference(self) -> float:
        """The largest one between two forms of the model in any metric."""
        first, *others = self.metrics.values()
        return max((abs(one[k] - first[k]) for one in others for k in first), default=0.0)

    def __str__(self) -> str:
        figures = (
            ', '.join(f'{name} {value:.2f}' for name, value in self.headline(form).items())
            + f' ({form})'
            for form in self.metrics
        )
        return f'{self.name}: {"; ".join(figures)}'


def task_of(cfg: Config) -> str:
    """classification, detection or segmentation.

    Raises:
        FastViTError: a config of something else, or one that cannot test.
    """
    scope = cfg.get('default_scope')
    if scope not in TASKS:
        raise FastViTError(
            f'robustness is measured of {", ".join(TASKS.values())}; the config has none of them '
            f'(default_scope {scope!r})'
        )
    if not cfg.get('test_dataloader'):
        raise FastViTError('the config has no test_dataloader: nothing to measure on')
    return TASKS[scope]


def usual_sets(cfg: Config) -> list[str]:
    return list(TITLES) if task_of(cfg) == 'classification' else ['c']


def check_known(what: str, names: Collection, known: Collection) -> None:
    """Raise a FastViTError for the first of ``names`` that is not among ``known``."""
    for name in names:
        if name not in known:
            raise FastViTError(f'there is no {what} {name}: known are {", ".join(map(str, known))}')


def check_sets(cfg: Config, names: Sequence[str]) -> None:
    """Whether the model's task is that of the sets.

    Raises:
        FastViTError: it is not.
    """
    task = task_of(cfg)
    foreign = [TITLES[name] for name in names if name != 'c']
    if task != 'classification' and foreign:
        raise FastViTError(
            f'{", ".join(foreign)}: only for classification, the config is for {task}; '
            'choose --sets c'
        )


def check_roots(cfg: Config, names: Sequence[str], roots: dict[str, str]) -> None:
    """Whether each place is that of a set that is measured.

    Raises:
        FastViTError: one is not.
    """
    if wrong := [name for name, path in roots.items() if name not in TITLES or not path]:
        raise FastViTError(f'--data-root {wrong[0]}: give SET=PATH, SET one of {", ".join(TITLES)}')
    task = task_of(cfg)
    if roots and task != 'classification':
        raise FastViTError(
            f'--data-root: only for classification; for {task}, set '
            'test_dataloader.dataset.data_root with --cfg-options'
        )
    if unused := [name for name in roots if name not in names]:
        raise FastViTError(
            f'--data-root {unused[0]}={roots[unused[0]]}: --sets has no {unused[0]}; '
            'add it there or leave out its place'
        )


def check_classes(cfg: Config, names: Sequence[str], catalogue: Catalogue) -> None:
    """Whether the model has the classes of the sets.

    Raises:
        FastViTError: it has another number.
    """
    found, wanted = cfg.model.get('head', {}).get('num_classes'), len(catalogue.classes)
    if found != wanted:
        raise FastViTError(
            f'{", ".join(TITLES[name] for name in names)}: for models of the {wanted} classes of '
            f'ImageNet-1k, the config has {found}'
        )


@dataclass
class Plan:
    """What to measure.

    Attributes:
        sets: the config's own test set first, cheap ones before the many corrupted ones.
        needs_test_set: the config's own test set must be there; otherwise the first set can go.
        corrupted_by: where corrupted images are from; '' without any.
        notes: what limits the figures' meaning.
    """

    sets: list[ImageSet]
    needs_test_set: bool
    corrupted_by: str = ''
    notes: list[str] = field(default_factory=list)

    def check_test_set(self, cfg: Config) -> None:
        """Look at the config's own test set; leave it out, with a note, if it is not there.

        Raises:
            FastViTError: it is needed and not there, or something is wrong with it.
        """
        roots = [one.get('data_root') or '' for one in datasets_in(cfg.test_dataloader)]
        missing = [root for root in roots if '://' not in root and not Path(root).exists()]
        if missing and not self.needs_test_set:
            self.sets.pop(0)
            self.notes.append(f'not measured on clean images: {missing[0]} does not exist')
        else:
            check_data(cfg, 'test')


def plan(
    cfg: Config,
    names: Sequence[str] | None = None,
    roots: dict[str, str] | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    demo: bool = False,
) -> Plan:
    """The sets to measure a config's model on.

    Args:
        names: of the sets, see ``TITLES``; None: all that fit the task.
        roots: places of sets other than those in ``ROOTS``. If there is none for ``c`` and its
            usual place does not exist, corrupted images are made from the test set.
        corruptions: some of ``CORRUPTIONS``; None: all.
        severities: some of ``SEVERITIES``; None: all; for detection and segmentation in their demo
            form ``FEW``.
        demo: generated sets; the config is in its demo form.

    Raises:
        FastViTError: a set is missing, incomplete, or not for this model.
    """
    names, roots = names or usual_sets(cfg), roots or {}
    check_known('set', names, TITLES)
    check_known('corruption', corruptions or (), CORRUPTIONS)
    check_known('severity', severities or (), SEVERITIES)
    check_sets(cfg, names)
    check_roots(cfg, names, roots)
    corruptions = [name for name in CORRUPTIONS if name in (corruptions or CORRUPTIONS)]
    classifies = task_of(cfg) == 'classification'
    notes = []
    if severities is None and demo and not classifies:
        severities = FEW
        notes.append(f'demo: severities {", ".join(map(str, FEW))} of 5')
    severities = sorted(set(severities or SEVERITIES))
    if not classifies:
        sets = [ImageSet('clean', cfg.test_dataloader.dataset, cfg.test_evaluator)]
        sets += regenerated_sets(cfg, corruptions, severities)
        return Plan(sets, True, 'test set corrupted at its own size', notes)
    released = 'c' in names and not demo and ('c' in roots or Path(ROOTS['c']).exists())
    needing = [name for name in names if name != 'c' or released]
    catalogue = demo_catalogue() if demo else published(roots) if needing else None
    if needing:
        check_classes(cfg, needing, catalogue)
    found = Plan(
        [ImageSet('clean', cfg.test_dataloader.dataset, ACCURACY)],
        needs_test_set='real' in names or ('c' in names and not released),
    )
    found.sets += [natural_set(cfg, one, catalogue) for one in ('a', 'r', 'sketch') if one in names]
    if 'real' in names:
        found.sets.append(real_set(cfg, catalogue))
    if released:
        found.corrupted_by = 'ImageNet-C'
        found.sets += released_sets(cfg, catalogue, corruptions, severities)
    elif 'c' in names:
        found.corrupted_by = 'regenerated, not ImageNet-C'
        crop = catalogue.crop if catalogue else CROP
        found.sets += regenerated_sets(cfg, corruptions, severities, crop)
    if 'c' in names and (len(corruptions), len(severities)) != (len(CORRUPTIONS), len(SEVERITIES)):
        found.notes.append('no mCE: it takes all 15 corruptions, a CE all 5 severities')
    return found


def forms(runner: Runner, reparam: bool, exported: bool) -> dict[str, nn.Module]:
    """The model in the forms to measure, by name.

    Raises:
        FastViTError: there is nothing to merge, or merging changes the outputs.
    """
    runner.call_hook('before_run')
    if exported:
        return {'exported file': runner.model}
    runner.load_or_resume()
    models = {'training form': unwrap(runner.model)}
    if reparam:
        models['deploy form'] = ReparameterizeHook().merge(runner)
    return models


def measure(
    runner: Runner, loader: dict, models: dict[str, nn.Module], sets: Sequence[ImageSet]
) -> Iterator[Result]:
    """Test the models on one set after the other.

    Args:
        loader: config of a data loader; the sets bring their own ``dataset``.
        models: see :func:`forms`.

    Raises:
        FastViTError: an image cannot be used.
    """
    level = runner.logger.level
    runner.logger.setLevel(logging.WARNING)  # the packages print tables after every test
    try:
        for one in sets:
            own = dict(dataset=one.dataset, persistent_workers=False)
            with (
                contextlib.redirect_stdout(io.StringIO()),  # pycocotools prints them
                only_classes(list(models.values()), one.labels),
            ):
                loop = FormsLoop(runner, {**loader, **own}, one.evaluator, models)
                runner._test_loop = loop  # where hooks look for the loop that runs
                metrics = loop.run()
            yield Result(one.name, len(loop.dataloader.dataset), metrics)
    finally:
        runner.logger.setLevel(level)
        runner.call_hook('after_run')
