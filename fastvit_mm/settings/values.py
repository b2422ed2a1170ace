"""Values that make no sense: kinds and ranges of settings, by their place."""

import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator
from inspect import Parameter
from numbers import Integral, Real
from typing import Any

Rule = tuple[Callable[[Any], bool], str]


def whole(least: int, *others: Any, exact: bool = False) -> Rule:
    """Whole numbers from ``least`` up, and ``others``; 12.0 only if not ``exact``."""

    def fits(value):
        if any(value is other or value == other for other in others):
            return not isinstance(value, bool)
        if isinstance(value, bool) or not isinstance(value, Integral if exact else Real):
            return False
        return math.isfinite(value) and value == int(value) and value >= least

    special = ''.join(f' or {other}' for other in others)
    return fits, f'a whole number from {least} up{special}'


def number(least: float, below: float = math.inf, above: bool = False) -> Rule:
    """Numbers in [least, below), or in (least, below) if ``above``."""

    def fits(value):
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        return math.isfinite(value) and least <= value < below and not (above and value == least)

    bound = f'above {least}' if above else f'from {least} up'
    return fits, f'a number {bound}' if below == math.inf else f'a number in [{least}, {below})'


def flag() -> Rule:
    return lambda value: value is None or value in (0, 1), 'True or False'


def text() -> Rule:
    return lambda value: isinstance(value, str), 'a name or path'


def optional(rule: Rule) -> Rule:
    fits, what = rule
    return lambda value: value is None or fits(value), f'{what}, or None'


def one_or_several(rule: Rule) -> Rule:
    fits, what = rule
    return lambda value: isinstance(value, list | tuple) or fits(value), what


LOADER = r'(?:train|val|test)_dataloader'
LEVELS = ('CRITICAL', 'FATAL', 'ERROR', 'WARNING', 'WARN', 'INFO', 'DEBUG', 'NOTSET')
RULES = {
    rf'{LOADER}\.batch_size': optional(whole(1, exact=True)),
    rf'{LOADER}\.num_workers': whole(0, exact=True),
    rf'{LOADER}\.prefetch_factor': optional(whole(1, exact=True)),
    rf'{LOADER}\.(persistent_workers|pin_memory|drop_last)': flag(),
    r'train_cfg\.(max_epochs|max_iters|val_interval)': whole(1),
    r'train_cfg\.val_begin': whole(0),
    r'train_cfg\.by_epoch': flag(),
    r'optim_wrapper\.optimizer\.(lr|weight_decay|momentum)': number(0),
    r'optim_wrapper\.optimizer\.eps': one_or_several(number(0)),
    r'optim_wrapper\.accumulative_counts': whole(1),
    r'optim_wrapper\.clip_grad\.max_norm': number(0, above=True),
    r'optim_wrapper\.clip_grad\.clip_value': number(0, above=True),
    r'param_scheduler(\.\d+)?\.begin': number(0),
    r'param_scheduler(\.\d+)?\.(end|T_max)': number(0, above=True),
    r'param_scheduler(\.\d+)?\.step_size': whole(1),
    r'default_hooks\.logger\.interval': whole(1),
    r'default_hooks\.checkpoint\.(interval|max_keep_ckpts)': whole(1, -1),
    r'default_hooks\.checkpoint\.(by_epoch|save_last|save_optimizer|save_param_scheduler)': flag(),
    r'auto_scale_lr\.base_batch_size': whole(1),
    r'auto_scale_lr\.enable': flag(),
    r'randomness\.seed': optional(whole(0)),
    r'randomness\.(deterministic|diff_rank_seed)': flag(),
    r'env_cfg\.cudnn_benchmark': flag(),
    r'(load_from|experiment_name|work_dir|launcher)': optional(text()),
    r'default_scope': text(),
    r'resume': flag(),
    r'log_level': (
        lambda value: isinstance(value, int) or str(value).upper() in LEVELS,
        f'one of {", ".join(LEVELS)}',
    ),
}
COMPILED = [(re.compile(pattern), rule) for pattern, rule in RULES.items()]


def out_of_range(path: str, value: Any) -> str | None:
    """What ``value`` should be instead, if it makes no sense at ``path``."""
    for pattern, (fits, what) in COMPILED:
        if pattern.fullmatch(path) and not fits(value):
            return what
    return None


NUMBERS = {int: 'a number', float: 'a number', bool: 'True or False', type(None): 'None'}
YES_AND_NO = ('yes', 'no', 'on', 'off', 'y', 'n', 't', 'f', 'none', '')


def unlike_annotation(parameter: Parameter | None, value: Any) -> str | None:
    """What a parameter takes, if its annotation says numbers and bools alone and ``value`` is text.

    Annotations are not always true: a tuple is often given for a number, a name for a bool.
    """
    if parameter is None or not isinstance(value, str):
        return None
    kinds = list(simple_types(parameter.annotation))
    if not all(kind in NUMBERS for kind in kinds):
        return None
    if bool in kinds and value.lower() not in YES_AND_NO:
        return None
    return ' or '.join(dict.fromkeys(NUMBERS[kind] for kind in kinds))


def simple_types(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for one in typing.get_args(annotation):
            yield from simple_types(one)
    else:
        yield annotation


def together(tree: dict, sections: Collection[str]) -> Iterator[str]:
    """Settings that exclude each other."""
    for section in sections:
        loader = tree.get(section)
        if not isinstance(loader, dict) or not section.endswith('_dataloader'):
            continue
        if loader.get('num_workers', 0) == 0:
            if loader.get('persistent_workers'):
                yield (
                    f'{section}.persistent_workers=True needs num_workers from 1 up: '
                    f'set {section}.persistent_workers=False, too'
                )
            if loader.get('prefetch_factor') is not None:
                yield (
                    f'{section}.prefetch_factor needs num_workers from 1 up: '
                    f'set {section}.prefetch_factor=None, too'
                )
    schedulers = tree.get('param_scheduler') if 'param_scheduler' in sections else None
    for index, one in enumerate(schedulers if isinstance(schedulers, list) else [schedulers]):
        if isinstance(one, dict) and 'end' in one and one['end'] <= one.get('begin', 0):
            yield (
                f'param_scheduler.{index}: its end, {one["end"]}, is not after its begin, '
                f'{one.get("begin", 0)}'
            )
