"""``--cfg-options``: parsing them, and changing a config with them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.config import Config, DictAction
from mmengine.utils import import_modules_from_strings

from fastvit_mm.errors import FastViTError, one_line

from .names import nearest

DELETE = '_delete_'


class OptionsAction(DictAction):
    """mmengine's, with one line for what is no ``key=value``."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            key, equals, _ = value.partition('=')
            if not (key and equals) or '' in key.split('.'):
                raise FastViTError(
                    f'{option_string}: {value!r} is not key=value, as in train_cfg.max_epochs=10'
                )
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (ValueError, AssertionError) as error:
                raise FastViTError(f'{option_string}: {value!r} cannot be read: {error}') from error


class Change(NamedTuple):
    """One setting: its place, and what was there.

    Attributes:
        known: how many names of its path were there.
    """

    path: tuple[str, ...]
    old: Any
    new: Any
    known: int

    @property
    def added(self) -> bool:
        return self.known < len(self.path)


def merge(cfg: Config, options: dict) -> list[Change]:
    """Change settings of ``cfg``, as ``Config.merge_from_dict`` does, and import what they add to
    its ``custom_imports``.

    Args:
        options: value of each path: ``{'train_dataloader.dataset.pipeline.1.scale': 64}``.

    Raises:
        FastViTError: a path leads through a value, or past the end of a list, or a module cannot
            be imported.
    """
    changes = [change(cfg, key, value, options) for key, value in options.items()]
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError, AttributeError) as error:
        names = ', '.join(options)
        raise FastViTError(f'{names} cannot be set together: {error}') from error
    if any(c.path[0] == 'custom_imports' for c in changes):
        import_modules(cfg.get('custom_imports'))
    return [c for c in changes if c.path[-1] != DELETE]


def import_modules(wanted: dict | None) -> None:
    """Import what ``custom_imports`` names, which mmengine does only when it reads the file."""
    wanted = {} if wanted is None else wanted
    if not isinstance(wanted, dict):
        raise FastViTError(f'custom_imports={wanted}: give custom_imports.imports=[{wanted}]')
    modules = wanted.get('imports')
    try:
        import_modules_from_strings(modules, bool(wanted.get('allow_failed_imports')))
    except Exception as error:  # whatever is in the modules
        reason = one_line(error.__context__ or error)  # mmengine's own error keeps it back
        raise FastViTError(f'custom_imports.imports={modules!r}: {reason}') from error


def change(cfg: Config, key: str, value: Any, options: dict) -> Change:
    node, path = cfg._cfg_dict, tuple(key.split('.'))
    for depth, name in enumerate(path):
        here = '.'.join(path[:depth])
        if isinstance(node, list | tuple):
            if not name.isdigit() or int(name) >= len(node):
                raise FastViTError(f'{key}: {here} is {a_list(node)}, which has no {name!r}')
            if isinstance(node, tuple):
                raise FastViTError(f'{key}: {here} is {node}: give all of it')
            node = node[int(name)]
        elif isinstance(node, dict):
            if name not in node:
                return Change(path, None, value, depth)
            node = node[name]
        elif options.get(f'{here}.{DELETE}'):
            return Change(path, None, value, depth)
        else:
            raise FastViTError(
                f'{key}: {here} is {node!r}, which has no settings of its own; to replace it by a '
                f'dict, add {here}.{DELETE}=True'
            )
    return Change(path, node, value, len(path))


def a_list(node: list | tuple) -> str:
    types = [str(n['type']) for n in node if isinstance(n, dict) and 'type' in n]
    if len(types) == len(node):
        numbered = ', '.join(f'{i} {t}' for i, t in enumerate(types))
        return f'a list of {len(node)} ({numbered})'
    return f'a list of {len(node)}'


def places(node: Any, wanted: Any, path: str = '') -> Iterator[str]:
    """Paths in a config at which there is a value equal to ``wanted``."""
    if path and type(node) is type(wanted) and node == wanted:
        yield path
        return
    if not isinstance(node, dict | list | tuple):
        return
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield from places(child, wanted, f'{path}.{key}' if path else str(key))


def wrong_kind(change: Change) -> str | None:
    """What is wrong if a setting's new value is of another kind than its old one."""
    old, new, place = change.old, change.new, '.'.join(change.path)
    if change.added or old is None or new is None:
        return None
    if isinstance(old, bool) and isinstance(new, str):
        return f'{place}={new}: give True or False'
    if isinstance(old, int | float) and not isinstance(old, bool) and isinstance(new, str):
        return f'{place}={new}: give a number, such as {old}'
    several = isinstance(old, list | tuple) and any(isinstance(n, dict) for n in old)
    if isinstance(old, dict) and not isinstance(new, dict | bool):
        inside = [k for k in old if k != 'type'][:1] or ['type']
        return f'{place}={new}: it is a dict; give its settings, such as {place}.{inside[0]}=...'
    if several and not isinstance(new, list | tuple | dict):
        return f'{place}={new}: it is a list of dicts; give its settings, such as {place}.0...'
    return None


def unread(key: str, tree: dict, changed: Change | None, known: set[str]) -> str:
    """What to say about a top-level key of ``tree`` that nothing reads.

    Args:
        changed: how an option has changed it.
        known: keys that are read.
    """
    sections = {k: v for k, v in tree.items() if k in known}
    if changed is None or changed.known == 0:
        inside = {}
        for section, part in sections.items():
            for name in part if isinstance(part, dict) else ():
                inside.setdefault(name, f'{section}.{name}')
        near = inside.get(key) or nearest(key, known) or inside.get(nearest(key, inside))
        return f'nothing reads {key}' + (f': did you mean {near}?' if near else '')
    text = f'{key} is a variable of the config file, which nothing reads any more'
    found = [] if changed.old is None else list(places(sections, changed.old))
    if not found:
        return text
    return f'{text}: set {", ".join(found[:3])}{" ..." if len(found) > 3 else ""}'
