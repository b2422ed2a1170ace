"""The package's own configs: where they are, and which one a name means."""

from fnmatch import fnmatch
from pathlib import Path

import yaml

from .errors import FastViTError
from .settings.names import suggestion

SCOPE = 'fastvit_mm::'


def folder() -> Path:
    """``configs/``: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = (package.parent / 'setup.py').is_file()
    return (package.parent if checkout else package / '.mim') / 'configs'


def names() -> list[str]:
    """What can follow ``fastvit_mm::``, sorted: ``classification/fastvit_ma36_384_in1k`` ..."""
    files = (path.relative_to(folder()) for path in folder().glob('[!_]*/*.py'))
    return sorted(path.with_suffix('').as_posix() for path in files)


def find(config: str) -> Path:
    """The file of a config.

    Args:
        config: a path, or ``fastvit_mm::<task>/<name>``, with or without ``.py``.

    Raises:
        FastViTError: there is none.
    """
    if not config.startswith(SCOPE):
        if (path := Path(config)).is_file():
            return path
        raise FastViTError(
            f'config {path} does not exist: the configs are under configs/<task>/, and installed '
            f'as {SCOPE}<task>/<name>'
        )
    name = config.removeprefix(SCOPE).removesuffix('.py')
    if name not in names():
        raise FastViTError(f'config {config} does not exist: {suggestion(name, names())}')
    return folder() / f'{name}.py'


def list_models(pattern: str = '*') -> list[str]:
    """Names of the models in the package's metafiles that match ``pattern``, as in a shell, sorted.

    A model's config is ``fastvit_mm::<task>/<name>``. mmpretrain's ``list_models`` and
    ``get_model`` know the classifiers by the same names.
    """
    files = folder().glob('*/metafile.yml')
    known = [yaml.safe_load(file.read_text(encoding='utf-8'))['Models'] for file in files]
    names = (model['Name'] for models in known for model in models)
    return sorted(name for name in names if fnmatch(name, pattern))
