"""The error that is meant for users."""

import importlib
from types import ModuleType


class FastViTError(ValueError):
    """One line that says what is wrong and what to do; the tools print it and exit with code 2."""

    def __str__(self) -> str:
        # A DataLoader puts what happened in a worker into the traceback's text.
        return super().__str__().rpartition(f'{type(self).__name__}: ')[2].strip()


def root_cause(error: FastViTError) -> FastViTError:
    """A registry that was building an object raises the error again with its own prefix."""
    while isinstance(error.__context__, FastViTError):
        error = error.__context__
    return error


def one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def require(what: str, *packages: str) -> ModuleType:
    """Import packages that are optional; gives the first.

    Args:
        what: needs them, in the user's words: a file, a format, an option.
        packages: their names on PyPI, which are those to import.

    Raises:
        FastViTError: some are not installed; says what installs them.
    """
    modules, missing = [], []
    for package in packages:
        try:
            modules.append(importlib.import_module(package))
        except ImportError:
            missing.append(package)
    if missing:
        names = ' '.join(missing)
        raise FastViTError(f'{what} needs {" and ".join(missing)}: pip install {names}')
    return modules[0]
