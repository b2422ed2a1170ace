"""Names: which are registered, which are meant, and which the code mentions at all."""

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

import mmengine.registry
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

from fastvit_mm.errors import FastViTError

ROOTS = [r for r in vars(mmengine.registry).values() if isinstance(r, Registry)]
#: Packages whose code reads configs; those of a config's own imports come on top.
READERS = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'fastvit_mm'}


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that ``name`` is most likely a typo of."""
    folded = {k.lower(): k for k in known}
    found = difflib.get_close_matches(str(name).lower(), folded, 1, cutoff)
    return folded[found[0]] if found else None


def suggestion(name: object, known: Collection[str], limit: int = 12) -> str:
    """What follows an unknown name: the nearest known one, or all if they are few."""
    begun = [k for k in known if len(str(name)) > 3 and k.lower().startswith(str(name).lower())]
    if near := min(begun, key=len, default=None) or nearest(name, known):
        return f'did you mean {near}?'
    names = sorted(map(str, known))
    if not names:
        return 'it takes none'
    return f'known are {", ".join(names[:limit])}{" and others" if len(names) > limit else ""}'


class Registered:
    """What a config's types can name, looked up in its scope as mmengine does."""

    def __init__(self, scope: str):
        self.scope = scope
        own = vars(registries) if (registries := imported(scope)) else {}
        self.others = [r for r in own.values() if isinstance(r, Registry) and r.parent is None]
        found = {root: root._search_child(scope) for root in ROOTS}
        # An empty registry, whose modules have not been imported yet, is false.
        self.local = {root: root if own is None else own for root, own in found.items()}
        if set(found.values()) == {None}:  # mmengine then builds with the registry at hand
            self.others += [child for root in ROOTS for child in root.children.values()]

    def get(self, root: Registry, name: str) -> Callable | None:
        registries = [self.local[root], *(r for r in self.others if r.parent is root)]
        return next((f for r in registries if (f := lookup(r, name))), None)

    def get_anywhere(self, name: str, first: Iterable[Registry]) -> Callable | None:
        registries = [self.local[root] for root in (*first, *ROOTS)] + self.others
        return next((f for r in dict.fromkeys(registries) if (f := lookup(r, name))), None)

    def names(self, *roots: Registry) -> set[str]:
        """All names that can be used in ``roots`` without their scope. A scope's registries that
        belong to no root count as well if there are several ``roots``."""
        found = set()
        others = self.others if len(roots) > 1 else []
        for registry in [self.local[root] for root in roots] + others:
            registry.import_from_location()
            while registry is not None:
                found |= set(registry.module_dict)
                registry = registry.parent
        return found


def lookup(registry: Registry, name: str) -> Callable | None:
    """What mmengine's ``registry.get`` finds, without its attempts to import plain names."""
    if '.' in name:
        try:
            return registry.get(name)
        except RuntimeError:  # what some versions of mmengine raise for an unknown name
            return None
    registry.import_from_location()
    while registry is not None and name not in registry.module_dict:
        registry = registry.parent
    return None if registry is None else registry.module_dict[name]


def imported(scope: object) -> ModuleType | None:
    """The module in which mmengine looks for the registries of a scope."""
    try:
        return importlib.import_module(f'{scope}.registry')
    except (ImportError, AttributeError, ValueError, TypeError):
        return None


def known_scope(scope: object) -> object:
    """``scope``, after checking that it is not nearly that of a package, nor of a missing one.

    Any other word works: its registries may be in any module that the config imports, or nowhere,
    if all types are registered in mmengine's.

    Raises:
        FastViTError: it is a typo, or an OpenMMLab package that is not installed.
    """
    known = {'mmengine', 'mmdet', 'mmseg', 'mmpretrain'}
    found = imported(scope) or any(r._search_child(scope) is not None for r in ROOTS)
    if not found and nearest(scope, known - {scope}, 0.85):
        raise FastViTError(
            f'default_scope {scope!r} is no package with registries: {suggestion(scope, known)}'
        )
    if not found and scope in MODULE2PACKAGE:
        raise FastViTError(f'default_scope {scope!r} needs {scope}, which is not installed')
    return scope


def mentioned(name: str, pattern: str, packages: Iterable[str] = READERS) -> bool:
    """Whether the source of any imported module has ``name`` in a certain context.

    Args:
        pattern: a regular expression with ``{}`` in place of the name.
        packages: top-level packages to search.
    """
    wanted = frozenset(packages)
    return spoken(name, pattern, [n for n in list(sys.modules) if n.partition('.')[0] in wanted])


def spoken(name: str, pattern: str, modules: Iterable[str]) -> bool:
    """The same for ``modules``."""
    compiled = re.compile(pattern.replace('{}', re.escape(name)))
    for module in modules:
        file = getattr(sys.modules.get(module), '__file__', None) or ''
        if file.endswith('.py') and name in (text := source(file)) and compiled.search(text):
            return True
    return False


@cache
def source(file: str) -> str:
    return Path(file).read_text('utf-8', errors='ignore')
