"""Files that say what ids are called."""

import csv
import json
import re
from pathlib import Path

import yaml

from fastvit_mm.errors import FastViTError, one_line

from .tree import Tree

USUAL = r'(.*[_-])?(classes|labels?|class_?names|label_?names|names|categories|class_?dict'
USUAL += r'|label_?map)([_-].*)?'
LINE = re.compile(r'(\d+)\s*[:,;\t ]\s*(.*\S)')


def read_names(tree: Tree, ids: list, given: str | None) -> tuple[dict, str | None]:
    """The name of each id of the masks, from the file that is given or lies beside them.

    Returns:
        names in the order of the ids, and the file's name; nothing if there is no such file.

    Raises:
        FastViTError: the file that was given cannot be used.
    """
    if given:
        return fitting(parse(Path(given)), ids, given), given
    for path in tree.of('.txt', '.csv', '.json', '.yaml', '.yml'):
        if len(path.parts) > 2 or not re.fullmatch(USUAL, path.stem, re.I):
            continue
        try:
            return fitting(parse(tree.root / path), ids, str(path)), str(path)
        except FastViTError:
            continue
    return {}, None


def fitting(names: dict | list, ids: list, file: str) -> dict:
    """Names by id, checked against the ids that occur.

    A list has no ids: it counts from 0, or from 1 if the masks have one id more than that.
    """
    colours = any(isinstance(one, str) for one in ids)
    if isinstance(names, list):
        most = max((one for one in ids if one != 255), default=0) if not colours else 0
        names = dict(enumerate(names, start=int(most == len(names))))
    if colours != any(isinstance(one, str) for one in names):
        raise FastViTError(
            f'{file} does not name the {"colours" if colours else "ids"} of the masks'
        )
    if not set(names) & set(ids):
        raise FastViTError(f'{file} names none of the ids in the masks')
    return dict(sorted(names.items()))


def parse(path: Path) -> dict | list:
    """Names by id or colour, or a list of names.

    Raises:
        FastViTError: it cannot be read, or has another form.
    """
    try:
        text = path.read_text(encoding='utf-8-sig')
        if path.suffix in ('.json', '.yaml', '.yml'):
            content = json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
            names = structured(content)
        elif path.suffix == '.csv':
            names = table(text)
        else:
            names = lines(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FastViTError(f'{path} cannot be read for names: {one_line(error)}') from error
    if not names:
        raise FastViTError(f'{path} holds no names: one in a line, or "3: name"')
    return names


def structured(content) -> dict | list:
    """A list, names by id, ids by name, or any of them under ``names``."""
    if isinstance(content, dict):
        content = next(
            (content[k] for k in ('names', 'classes', 'labels') if k in content), content
        )
    if isinstance(content, list):
        return [one for one in content if isinstance(one, str)]
    if not isinstance(content, dict):
        return {}
    if all(isinstance(one, int) for one in content.values()):
        content = {number: name for name, number in content.items()}
    return {int(k): v for k, v in content.items() if str(k).isdecimal() and isinstance(v, str)}


def table(text: str) -> dict | list:
    """Comma-separated values with a header: name and id, or name, r, g, b."""
    names = {}
    for number, one in enumerate(csv.DictReader(text.splitlines())):
        row = {k.strip().lower(): (v or '').strip() for k, v in one.items() if k}
        name = next((row[k] for k in ('name', 'label', 'class', 'names') if row.get(k)), None)
        if name is None:
            return lines(text)
        if all(row.get(k, '').isdecimal() for k in 'rgb'):
            names['#' + ''.join(f'{int(row[k]):02x}' for k in 'rgb')] = name
        else:
            identity = next((row[k] for k in ('id', 'index', 'value') if row.get(k)), str(number))
            names[int(identity)] = name
    return names


def lines(text: str) -> dict | list:
    """A name in each line, "3: name", or CVAT's "name:r,g,b:parts:actions"."""
    names: dict = {}
    rows = [one.strip() for one in text.splitlines()]
    rows = [one for one in rows if one and not one.startswith(('#', '//'))]
    for row in rows:
        if found := re.fullmatch(r'(.+?):(\d+),(\d+),(\d+)(?::.*)?', row):
            names['#' + ''.join(f'{int(v):02x}' for v in found.groups()[1:])] = found[1]
        elif found := LINE.fullmatch(row):
            names[int(found[1])] = re.split(r'[,\t]', found[2])[0].strip()
    if names and len(names) == len(rows):
        return names
    return {} if names else rows
