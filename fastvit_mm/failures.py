"""What a tool says when it fails: one line, and where the traceback is."""

import logging
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir

from mmengine.logging import MMLogger
from mmengine.registry import build_from_cfg
from torch import OutOfMemoryError

from .errors import FastViTError

# How torch reports the error of a data worker: with the worker's traceback in the message.
IN_WORKER = re.compile(r'Caught (\w+) in \w+ worker process \d+\.\nOriginal Traceback')


def explain(error: BaseException, debug: bool = False) -> tuple[str, int]:
    """One line that says what failed, and the exit code: 2 for what the user can mend.

    The traceback of an error that nobody foresaw is written to a file, unless ``debug`` says that
    it has been shown.
    """
    readings = (meant_for_users, not_deterministic, of_several_sizes, blamed)
    if text := next(filter(None, (read(error) for read in readings)), None):
        return text, 2
    if debug:
        return described(error), 1
    path = write_traceback(error)
    where = f'traceback in {path}' if path else 'add --debug to see the traceback'
    return f'{described(error)} ({where})', 1


def meant_for_users(error: BaseException) -> str | None:
    """The text of the FastViTError that ``error`` is or passes on; None if there is none."""
    found = root_cause(error)
    return None if found is None else without_traceback(found)


def root_cause(error: BaseException) -> FastViTError | None:
    """The first FastViTError of those that ``error`` passes on."""
    found = None
    for one in chain(error):
        if isinstance(one, FastViTError):
            found = one
            if one.__cause__ is not None:  # whoever raised it knew what was behind it
                break
    return found


def chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and the errors that it passes on: those it was raised from, and those whose text
    is part of its own, as with a registry that raises an error again with its own prefix."""
    while error is not None:
        yield error
        inner, text = error.__cause__ or error.__context__, str(error)
        known = error.__cause__ is not None or isinstance(error, FastViTError)
        error = inner if known or (str(inner or '') and str(inner) in text) else None


def without_traceback(error: BaseException) -> str:
    """The text of an error in one line, without the traceback that a data worker adds."""
    text = str(error)
    if caught := IN_WORKER.match(text):
        _, *texts = re.split(rf'^(?:\w+\.)*{caught[1]}(?:: |$)', text, flags=re.MULTILINE)
        text = texts[-1] if texts else caught[1]
    return ' '.join(text.split())


def not_deterministic(error: BaseException) -> str | None:
    """What to do if PyTorch refuses an operator because of ``--deterministic``."""
    if not (found := re.match(r'(\S+) does not have a deterministic implementation', str(error))):
        return None
    return (
        f'{found[1]}, which this model needs, has no deterministic algorithm on this device: leave '
        'out --deterministic (randomness.deterministic)'
    )


def of_several_sizes(error: BaseException) -> str | None:
    """What to do if mmseg is given a batch of images that it cannot stack."""
    if str(error) != 'The image size in a batch should be the same.':
        return None
    return (
        'this data set has images of several sizes, and a segmentor computes only images of one '
        'size together: leave out --batch-size (test_dataloader.batch_size=1)'
    )


def blamed(error: BaseException) -> str | None:
    """What of the config could not be built, if that is what failed: ``FPN: ...``."""
    if isinstance(error, OutOfMemoryError | MemoryError | OSError):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    builders = [f for f in frames if f.f_code is build_from_cfg.__code__]
    if not builders:
        return None
    kind = builders[-1].f_locals.get('obj_type') or builders[-1].f_locals['cfg'].get('type')
    return f'{getattr(kind, "__name__", kind)} cannot be built as configured: {described(error)}'


def described(error: BaseException) -> str:
    text = without_traceback(error)[:500]
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


def write_traceback(error: BaseException) -> Path | None:
    """Write the traceback of an error beside the run's log, or else into a temporary folder."""
    text = ''.join(traceback.format_exception(error))
    for folder in (log_folder, gettempdir):
        try:
            with NamedTemporaryFile(
                'w', prefix='error_', suffix='.txt', dir=folder(), delete=False
            ) as file:
                file.write(text)
            return Path(file.name)
        except (OSError, LookupError):
            continue
    return None


def log_folder() -> Path:
    """Where the run in this process writes its log.

    Raises:
        LookupError: there is no such run.
    """
    for handler in MMLogger.get_current_instance().handlers:
        if isinstance(handler, logging.FileHandler):
            return Path(handler.baseFilename).parent
    raise LookupError
