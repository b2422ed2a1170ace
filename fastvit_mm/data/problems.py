"""What can be wrong with a data set."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log

from fastvit_mm.errors import FastViTError, one_line

#: It ends a run; a run goes on with less or other data than meant; it may be meant.
STOPS, SPOILS, NOTE = LEVELS = ('stops', 'spoils', 'note')


@dataclass(frozen=True)
class Problem:
    """One line of a report.

    Args:
        file: the file or folder.
        wrong: what is wrong with it, a clause whose subject is the file.
        then: what happens if it stays.
        level: one of :data:`LEVELS`.
    """

    file: str
    wrong: str
    then: str = 'a run stops there'
    level: str = STOPS

    def __str__(self) -> str:
        return f'{self.file} {self.wrong}'


def settle(problems: Iterable[Problem]) -> None:
    """Log what only spoils a run, one line for each kind, and refuse to run with the rest.

    Raises:
        FastViTError: names the first file that would stop the run.
    """
    problems = list(problems)
    if bad := [one for one in problems if one.level == STOPS]:
        rest = f'; {len(bad) - 1} more: tools/check_data.py lists all' if len(bad) > 1 else ''
        raise FastViTError(replace(bad[0], wrong=bad[0].wrong + rest))
    kinds: dict[str, list[Problem]] = {}
    for one in problems:
        if one.level == SPOILS:
            kinds.setdefault(one.then, []).append(one)
    for then, group in kinds.items():
        more = f' (and {len(group) - 1} more)' if len(group) > 1 else ''
        line = f'{group[0]}{more}: {then}; tools/check_data.py lists all'
        print_log(line, 'current', logging.WARNING)


def settle_once(find: Callable[[], Iterable[Problem]]) -> None:
    """Look for problems on rank 0 alone, which spares the storage, and give all its verdict.

    All ranks of a process group call this; without one, it looks at once.

    Raises:
        FastViTError: names the first file that would stop the run; on every rank.
    """
    verdict = [None]
    if is_main_process():
        try:
            settle(find())
        except Exception as error:
            known = isinstance(error, FastViTError)
            verdict = [error if known else RuntimeError(f'rank 0 failed: {one_line(error)}')]
            broadcast_object_list(verdict)
            raise
    broadcast_object_list(verdict)
    if verdict[0]:
        raise verdict[0]
