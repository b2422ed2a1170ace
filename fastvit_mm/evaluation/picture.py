"""A picture of accuracy over severity."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .corruption_error import GROUPS, SEVERITIES
from .report import Report


def draw_curves(axis: Axes, report: Report, metric: str, group: str) -> None:
    """The corruptions of one group, in colours, and the mean of all of them."""
    form = report.forms[0]
    curves, clean = report.curves(form, metric), report.value('clean', form, metric)

    def line(points: dict[int, float], **style) -> None:
        points = dict(points) if clean is None else {0: clean, **points}
        axis.plot(list(points), list(points.values()), clip_on=False, **style)

    severities = sorted({severity for one in curves.values() for severity in one})
    means = {}
    for severity in severities:
        there = [one[severity] for one in curves.values() if severity in one]
        means[severity] = sum(there) / len(there)
    line(means, color='0.6', linestyle='--', linewidth=1.5, label=f'mean of {len(curves)}')
    for name in GROUPS[group]:
        if name in curves:
            line(curves[name], marker='o', markersize=4, label=name.replace('_', ' '))
    axis.set_title(group, loc='left', fontsize=11)
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlim(0 if clean is not None else 1, max(SEVERITIES))
    axis.set_xticks(
        [0, *SEVERITIES] if clean is not None else SEVERITIES,
        (['clean'] if clean is not None else []) + [str(one) for one in SEVERITIES],
    )
    axis.legend(fontsize=8, loc='best', framealpha=0.6, edgecolor='none')


def plot(report: Report, path: Path) -> None:
    """One row for each metric, one panel for each group of corruptions."""
    metrics, groups = report.metrics, list(GROUPS)
    size = (3.1 * len(groups), 2.9 * len(metrics) + 0.7)
    figure = Figure(size, dpi=110, layout='constrained')
    rows = figure.subplots(len(metrics), len(groups), sharey='row', squeeze=False)
    for axes, metric in zip(rows, metrics, strict=True):
        for axis, group in zip(axes, groups, strict=True):
            draw_curves(axis, report, metric, group)
        axes[0].set_ylabel(f'{metric} (%)')
        axes[0].set_ylim(bottom=0)
    for axis in rows[-1]:
        axis.set_xlabel('severity')
    figure.suptitle(f'{report.model}: {report.corrupted_by}', fontsize=12)
    figure.savefig(path)
