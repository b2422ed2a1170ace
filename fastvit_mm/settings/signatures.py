"""Which settings a class or a function takes, according to its signature and source."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from inspect import Parameter
from typing import NamedTuple

READS = ('get', 'pop', 'setdefault')


class Takes(NamedTuple):
    """Names a callable takes as keywords, with their parameters where they have one."""

    names: dict[str, Parameter | None]
    anything: bool  # other names may be taken, too


@cache
def accepted(target: Callable) -> Takes:
    """What ``target`` takes as keywords.

    A ``**kwargs`` that a constructor hands to that of its parent adds what the parent takes.
    """
    try:
        return of_class(target) if inspect.isclass(target) else of_function(target)
    except (ValueError, TypeError, OSError, SyntaxError):  # built in, or without source
        return Takes({}, True)


@cache
def definer(target: Callable, name: str) -> str:
    """The package of the class whose constructor has a parameter ``name``: that of ``target``, or
    the parent that gets it by ``**kwargs``. The package of ``target`` if none has."""
    for cls in target.__mro__ if inspect.isclass(target) else ():
        init = vars(cls).get('__init__')
        if inspect.isfunction(init) and name in inspect.signature(init).parameters:
            return cls.__module__.partition('.')[0]
    return getattr(target, '__module__', '').partition('.')[0]


def of_function(function: Callable) -> Takes:
    parameters = inspect.signature(function).parameters
    # a decorator may rename what it takes
    return Takes(named(parameters), bool(variable(parameters)) or hasattr(function, '__wrapped__'))


def of_class(cls: type) -> Takes:
    names, anything = {}, cls.__new__ is not object.__new__
    for parent in cls.__mro__:
        init = vars(parent).get('__init__')
        if init is None or parent is object:
            continue
        if not inspect.isfunction(init):
            return Takes(names, True)
        parameters = inspect.signature(init).parameters
        names = named(parameters) | names
        anything |= hasattr(init, '__wrapped__')
        rest = variable(parameters)
        if rest is None:
            break
        read, handed_on = read_from(init, rest)
        names = dict.fromkeys(read) | names
        anything |= not handed_on
    return Takes(names, anything)


def named(parameters) -> dict[str, Parameter | None]:
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {n: p for n, p in parameters.items() if p.kind in kinds and n != 'self'}


def variable(parameters) -> str | None:
    """The name of ``**kwargs``."""
    return next((p.name for p in parameters.values() if p.kind is Parameter.VAR_KEYWORD), None)


def read_from(init: Callable, kwargs: str) -> tuple[set[str], bool]:
    """Names that a constructor reads from its ``kwargs``, and whether it does nothing else with
    them but hand them to its parent."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(init)))
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    names, handed_on, kept = set(), False, False
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Name) and node.id == kwargs):
            continue
        user = parent[node]
        if is_super_init(user, parent):
            handed_on = True
        elif (name := name_read(user, parent)) is not None:
            names.add(name)
        else:
            kept = True
    return names, handed_on and not kept


def is_super_init(node: ast.AST, parent: dict) -> bool:
    """Whether ``node`` is the ``**kwargs`` of a ``super().__init__(**kwargs)``."""
    match node, parent.get(node):
        case (
            ast.keyword(arg=None),
            ast.Call(
                func=ast.Attribute(attr='__init__', value=ast.Call(func=ast.Name(id='super')))
            ),
        ):
            return True
    return False


def name_read(node: ast.AST, parent: dict) -> str | None:
    """``name`` if ``node`` is part of ``kwargs.pop('name')``, ``kwargs['name']`` and the like."""
    match node, parent.get(node):
        case ast.Subscript(slice=ast.Constant(value=str(name))), _:
            return name
        case ast.Compare(left=ast.Constant(value=str(name)), ops=[ast.In() | ast.NotIn()]), _:
            return name
        case (
            ast.Attribute(attr=method),
            ast.Call(args=[ast.Constant(value=str(name)), *_]),
        ) if method in READS:
            return name
    return None
