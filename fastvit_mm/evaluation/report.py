"""What was measured, as tables and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from mmengine.config import Config

from fastvit_mm.settings.widths import type_of

from .corruption_error import CORRUPTIONS, corruption_errors, mce
from .figures import published_rows
from .robustness import Plan, Result, task_of

COLUMNS = ('clean', 'c', 'a', 'r', 'sketch', 'real')
HEADS = dict(clean='clean', c='IN-C mCE', a='IN-A', r='IN-R', sketch='IN-Sketch', real='ReaL')


def number(value: float | None) -> str:
    return '-' if value is None else f'{value:.2f}'


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append('  '.join([first.ljust(widths[0]), *cells]).rstrip())
    return '\n'.join(lines)


@dataclass
class Report:
    """Figures of one model on all sets.

    Attributes:
        model, checkpoint: their names.
        task: classification, detection or segmentation.
        arch: the variant, for published figures; '' for none.
        corrupted_by: where corrupted images are from.
        notes: what limits the figures' meaning.
    """

    model: str
    checkpoint: str
    task: str
    arch: str = ''
    corrupted_by: str = ''
    notes: list[str] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg: Config, checkpoint: str, plan: Plan) -> 'Report':
        """An empty report for a config's model."""
        name, backbone = type_of(cfg.model), cfg.model.get('backbone')
        arch = backbone.get('arch', 'sa36') if type_of(backbone) == 'FastViT' else ''
        arch = arch if isinstance(arch, str) else ''
        notes = list(plan.notes)
        if cfg.get('demo'):
            notes.append('generated images: for trying this out, the figures mean nothing else')
        return cls(
            f'FastViT-{arch.upper()} {name}' if arch else name,
            checkpoint,
            task_of(cfg),
            arch,
            plan.corrupted_by,
            notes,
        )

    def add(self, result: Result) -> None:
        self.results[result.name] = result

    @property
    def forms(self) -> list[str]:
        return list(next(iter(self.results.values())).metrics) if self.results else []

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics in tables, such as top-1 or mIoU."""
        return list(next(iter(self.results.values())).headline(self.forms[0]))

    def value(self, name: str, form: str, metric: str) -> float | None:
        """A metric in percent; None if it was not measured."""
        result = self.results.get(name)
        return None if result is None else result.headline(form).get(metric)

    def curves(self, form: str, metric: str) -> dict[str, dict[int, float]]:
        """A metric in percent by corruption and severity."""
        found = {}
        for name in self.results:
            corruption, _, severity = name.partition('/')
            if severity:
                found.setdefault(corruption, {})[int(severity)] = self.value(name, form, metric)
        return {name: found[name] for name in CORRUPTIONS if name in found}

    def errors(self, form: str) -> dict[str, list[float]]:
        """Top-1 errors in percent by corruption, for :func:`corruption_errors`."""
        curves = self.curves(form, 'top-1')
        return {name: [100 - value for value in one.values()] for name, one in curves.items()}

    def summary(self, form: str) -> dict[str, float | None]:
        """The paper's columns for a form of a classifier."""
        figures = {name: self.value(name, form, 'top-1') for name in COLUMNS if name != 'c'}
        return {**figures, 'c': mce(self.errors(form))}

    def summary_table(self) -> str:
        """The paper's table: accuracies, and published ones beside them."""
        rows = {f'this model, {form}': self.summary(form) for form in self.forms}
        rows |= published_rows(self.arch)
        table = [[self.metrics[0] + ' (%)', *(HEADS[name] for name in COLUMNS)]]
        for title, figures in rows.items():
            table.append([title, *(number(figures.get(name)) for name in COLUMNS)])
        images = {name: f'{one.images:,}' for name, one in self.results.items()}
        per_set = next((count for name, count in images.items() if '/' in name), None)
        if per_set:
            sets = sum('/' in name for name in images)
            images['c'] = f'{sets} x {per_set}'
        table.append(['images', *(images.get(name, '-') for name in COLUMNS)])
        return aligned(table)

    def corruption_table(self, form: str, metric: str) -> str:
        """A metric by corruption and severity, and what is left of it."""
        curves, clean = self.curves(form, metric), self.value('clean', form, metric)
        severities = sorted({severity for one in curves.values() for severity in one})
        classifies = self.task == 'classification'
        errors = corruption_errors(self.errors(form)) if classifies else {}
        last = 'CE' if classifies else 'retained'
        table = [[f'{metric} (%), severity', *map(str, severities), 'mean', last]]

        def row(title: str, values: Sequence[float | None], ending: float | None) -> None:
            there = [value for value in values if value is not None]
            table.append([title, *map(number, values), number(np.mean(there)), number(ending)])

        def retained(values: Sequence[float]) -> float | None:
            return 100 * float(np.mean(values)) / clean if clean else None

        for name, one in curves.items():
            values = [one.get(severity) for severity in severities]
            row(name, values, errors.get(name) if classifies else retained(list(one.values())))
        means = [
            float(np.mean([one[severity] for one in curves.values() if severity in one]))
            for severity in severities
        ]
        row('mean', means, mce(self.errors(form)) if classifies else retained(means))
        return aligned(table)

    def agreement(self) -> str:
        """Whether the forms of the model have the same metrics everywhere; '' for one form."""
        if len(self.forms) < 2:
            return ''
        worst = max(self.results.values(), key=Result.difference)
        names, count = ' and '.join(self.forms), len(self.results)
        if not worst.difference():
            return f'{names}: equal in all metrics on all {count} sets'
        differing = sum(result.difference() > 0 for result in self.results.values())
        return (
            f'{names}: metrics differ by up to {worst.difference():.4g} ({worst.name}), '
            f'on {differing} of {count} sets'
        )

    def __str__(self) -> str:
        parts = [f'{self.model}, {self.checkpoint}']
        if self.task == 'classification':
            parts.append(self.summary_table())
        for metric in self.metrics:
            if self.curves(self.forms[0], metric):
                title = f'{self.corrupted_by}, {self.forms[0]}'
                clean = self.value('clean', self.forms[0], metric)
                title += '' if clean is None else f'; clean {metric} {number(clean)}'
                parts.append(f'{title}\n{self.corruption_table(self.forms[0], metric)}')
        parts.append('\n'.join(filter(None, [*self.notes, self.agreement()])))
        return '\n\n'.join(filter(None, parts))

    def as_json(self) -> dict:
        """Everything measured, in the packages' own units, and what tables make of it in %."""
        found = dict(model=self.model, checkpoint=self.checkpoint, task=self.task)
        found |= dict(corrupted_by=self.corrupted_by, notes=self.notes)
        if self.task == 'classification':
            found['summary'] = {form: self.summary(form) for form in self.forms}
            found['corruption_errors'] = {
                form: corruption_errors(self.errors(form)) for form in self.forms
            }
            found['published'] = published_rows(self.arch)
        found['sets'] = {
            name: dict(images=one.images, difference=one.difference(), metrics=one.metrics)
            for name, one in self.results.items()
        }
        return found
