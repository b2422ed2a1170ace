"""Files that say what ids are called."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import yaml

from fastvit_mm.errors import FastViTError, one_line

from .tree import IMAGES, Tree

USUAL = r'(.*[_-])?(classes|labels?|class_?names|label_?names|names|categories|class_?dict'
USUAL += r'|label_?map)([_-].*)?'
MOST = 255  # names
NAMES = ('name', 'names', 'class', 'class_name', 'label', 'label_name', 'category', 'classes')
IDS = ('id', 'class_id', 'label_id', 'category_id', 'index', 'value', 'label', 'class')
PICTURE = re.compile(rf'({"|".join(map(re.escape, IMAGES))})\b', re.I)
LINE = re.compile(r'(\d+)\s*[:,;\t ]\s*(.*\S)')


def read_names(tree: Tree, ids: list, given: str | None) -> tuple[dict, str | None, list[str]]:
    """The name of each id of the masks, from the file that is given or lies beside them.

    Returns:
        names in the order of the ids, and the file's name; nothing if there is no such file; and
        lines about what is doubtful.

    Raises:
        FastViTError: the file that was given cannot be used.
    """
    if given:
        return fitting(parse(Path(given)), ids, given)
    unused = []
    for path in tree.of('.txt', '.csv', '.json', '.yaml', '.yml'):
        if len(path.parts) > 2 or not re.fullmatch(USUAL, path.stem, re.I):
            continue
        try:
            names, source, notes = fitting(parse(tree.root / path), ids, str(path))
            return names, source, unused + notes
        except FastViTError as error:
            unused.append(f'note: no names from {path}: {error}')
    return {}, None, unused


def fitting(names: dict | list, ids: list, file: str) -> tuple[dict, str, list[str]]:
    """Names by id, checked against the ids that occur.

    A list has no ids: it counts from 0, or from 1 if the masks have one id more than that.
    """
    colours, notes = any(isinstance(one, str) for one in ids), []
    if isinstance(names, list):
        most = max((one for one in ids if one != 255), default=0) if not colours else 0
        first, number = int(most == len(names)), len(names)
        if not first and most < number - 1:
            about = f'{file} has {number} names, the largest id is {most}: counted from 0'
            notes.append(f'note: {about}; if it counts from 1, write "1: {names[0]}" and so on')
        names = dict(enumerate(names, start=first))
    if colours != any(isinstance(one, str) for one in names):
        raise FastViTError(
            f'{file} does not name the {"colours" if colours else "ids"} of the masks'
        )
    if not set(names) & set(ids):
        raise FastViTError(f'{file} names none of the ids in the masks')
    return dict(sorted(names.items())), file, notes


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
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise FastViTError(f'{path} cannot be read for names: {one_line(error)}') from error
    check(names, path)
    return names


def check(names: dict | list, path: Path) -> None:
    """Raises:
    FastViTError: these are no names of classes, but a list of images, or numbers.
    """
    values = list(names.values()) if isinstance(names, dict) else names
    if not values:
        raise FastViTError(f'{path} holds no names: one in a line, or "3: name"')
    if len(values) > MOST or any(PICTURE.search(one) for one in values):
        raise FastViTError(f'{path} is a list of {len(values)} files or others, not of classes')
    if twice := next((one for one, n in Counter(values).items() if n > 1), None):
        raise FastViTError(f'{path} has the name {twice!r} twice')
    if all(one.isdecimal() for one in values):
        raise FastViTError(f'{path} holds numbers, no names')


def structured(content) -> dict | list:
    """A list, names by id, ids by name, or any of them under ``names``."""
    if isinstance(content, dict):
        content = next(
            (content[k] for k in ('names', 'classes', 'labels', 'categories') if k in content),
            content,
        )
    if isinstance(content, list) and all(isinstance(one, str) for one in content):
        return content
    if isinstance(content, list):  # of objects such as COCO's categories
        content = {one['id']: one['name'] for one in content}
    if not isinstance(content, dict):
        return {}
    if all(isinstance(one, int) for one in content.values()):
        content = {number: name for name, number in content.items()}
    return {int(k): v for k, v in content.items() if str(k).isdecimal() and isinstance(v, str)}


def table(text: str) -> dict | list:
    """Comma-separated values: a column of names and one of ids, or of names, r, g, b; the columns
    may have a heading."""
    rows = [[one.strip() for one in row] for row in csv.reader(text.splitlines()) if any(row)]
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError('its lines have different numbers of columns')
    head = [one.lower() for one in rows[0]]
    if any(one.isdecimal() for one in head):  # no heading
        return lines(text)
    if len(head) == 1 and head[0] not in NAMES:
        raise ValueError(f'its first line should be "name", not {rows[0][0]!r}')
    columns = dict(zip(head, zip(*rows[1:], strict=True), strict=False))
    numeric = {k: v for k, v in columns.items() if all(map(str.isdecimal, v))}
    names = columns[only('names', [k for k in columns if k not in numeric], NAMES)]
    if set('rgb') <= {*numeric}:
        return dict(zip(map(colour, *(numeric[k] for k in 'rgb')), names, strict=True))
    if not numeric:
        return list(names)
    ids = numeric[only('ids', list(numeric), IDS)]
    if len(set(ids)) < len(ids):
        raise ValueError('it has an id twice')
    return dict(zip(map(int, ids), names, strict=True))


def only(what: str, columns: list[str], usual: tuple[str, ...]) -> str:
    """The one column, or the one with a usual heading."""
    known = [one for one in columns if one in usual] if len(columns) > 1 else columns
    if len(known) != 1:
        raise ValueError(f'which column has the {what}? of {", ".join(columns) or "none"}')
    return known[0]


def colour(*rgb: str) -> str:
    return '#' + ''.join(f'{int(one):02x}' for one in rgb)


def lines(text: str) -> dict | list:
    """A name in each line, "3: name", or CVAT's "name:r,g,b:parts:actions"."""
    names: dict = {}
    rows = [one.strip() for one in text.splitlines()]
    rows = [one for one in rows if one and not one.startswith(('#', '//'))]
    for row in rows:
        if found := re.fullmatch(r'(.+?):(\d+),(\d+),(\d+)(?::.*)?', row):
            names[colour(*found.groups()[1:])] = found[1]
        elif found := LINE.fullmatch(row):
            names[int(found[1])] = re.split(r'[,\t]', found[2])[0].strip()
    if names and len(names) == len(rows):
        return names
    return {} if names else rows
