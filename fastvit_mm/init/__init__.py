"""`fastvit init`: a config, and what else is missing, for a data set of one's own."""

import json
from pathlib import Path

from fastvit_mm.errors import FastViTError
from fastvit_mm.models.archs import ARCHS

from . import boxes, config, folders, masks
from .found import Found
from .recipe import Machine, recipe
from .tree import SPLITS, Tree, almost_splits, is_written, median_size, name_of, plain

__all__ = ['TASKS', 'Found', 'Machine', 'init']

TASKS = ('classification', 'detection', 'segmentation')


def init(
    out: str | Path,
    task: str,
    data: str | Path,
    arch: str = 't8',
    pretrained: str | None = None,
    seed: int = 0,
    val: float = 0.2,
    overwrite: bool = False,
    layout: str | None = None,
    names: str | None = None,
    unlabelled: str | None = None,
    machine: Machine | None = None,
) -> list[str]:
    """Look at a data set and write ``out/config.py`` and the lists or annotations that it reads.

    Nothing is written under ``data`` unless ``out`` lies there.

    Args:
        out: a folder that does not exist or is empty.
        task: one of :data:`TASKS`.
        data: a folder, a COCO json or YOLO's yaml.
        pretrained: weights to start from: a short name, file or URL; None starts from scratch.
        seed: what is drawn with.
        val: the fraction of images that is kept for validation if the data has no such part.
        overwrite: replace what an earlier call has written.
        layout: of detection, if the data has several: one of ``boxes.LAYOUTS``.
        names: of segmentation: a file with the names of the masks' ids.
        unlabelled: of segmentation: the id or colour without a class, or 'none'.
        machine: where it will run; None for this one.

    Returns:
        What was found and written, in lines for the user.

    Raises:
        FastViTError: the data cannot be used as it is, or ``out`` has files.
    """
    out, machine = plain(out), machine or Machine.here()
    check(out, task, arch, val, overwrite)
    pretrained = weights_for(arch, pretrained)
    tree = Tree(data, skip=out)
    if out == tree.root or out in tree.root.parents:
        raise FastViTError(f'{out} holds the data: choose another folder for the config')
    if task == 'classification':
        found = folders.find(tree, val, seed)
    elif task == 'segmentation':
        found = masks.find(tree, val, seed, names, unlabelled)
    else:
        found = boxes.find(tree, val, seed, layout)
    if odd := almost_splits(tree.images):
        found.say(
            f'note: {", ".join(odd[:5])} are not taken for splits: name them train, val, test'
        )
    median = median_size(images_of(found))
    numbers = recipe(task, len(found.splits['train']), median, bool(pretrained), machine)
    if task == 'detection':
        found.details['anchor'] = boxes.anchor(found, numbers.size)
    texts = files_of(task, found)
    texts['config.py'] = config.write(task, found, numbers, machine, arch, pretrained)
    save(out, texts)
    return report(out, found, median, texts)


def check(out: Path, task: str, arch: str, val: float, overwrite: bool) -> None:
    if task not in TASKS:
        raise FastViTError(f'--task {task}: one of {", ".join(TASKS)}')
    if arch not in ARCHS:
        raise FastViTError(f'--arch {arch}: one of {", ".join(ARCHS)}')
    if not 0 < val < 1:
        raise FastViTError(f'--val {val:g}: a fraction between 0 and 1')
    if out.is_file():
        raise FastViTError(f'{out} is a file: give a folder')
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FastViTError(f'{out} has files: give another folder, or --overwrite')


def weights_for(arch: str, pretrained: str | None) -> str | None:
    """The weights as the config names them: a file by its whole path.

    Raises:
        FastViTError: they are published for another variant.
    """
    if pretrained is None or Path(pretrained).is_file():
        return pretrained and str(plain(pretrained))
    other = pretrained.partition('.')[0].removeprefix('fastvit_')
    if other in ARCHS and other != arch:
        raise FastViTError(f'--pretrained {pretrained} is for {other}: add --arch {other}')
    return pretrained


def images_of(found: Found) -> list[Path]:
    return [found.root / name_of(one) for part in found.splits.values() for one in part]


def files_of(task: str, found: Found) -> dict[str, str]:
    """Lists and annotations, by name."""
    if 'files' in found.details:
        return {}
    if task == 'detection':
        contents = {s: boxes.as_coco(part, found.classes) for s, part in found.splits.items()}
        return {f'{split}.json': json.dumps(one) for split, one in contents.items()}
    between = '\t' if task == 'segmentation' else ' '
    texts = {}
    for split, part in found.splits.items():
        rows = [f'{path.as_posix()}{between}{Path(str(other)).as_posix()}' for path, other in part]
        texts[f'{split}.txt'] = '\n'.join(rows) + '\n'
    return texts


def save(out: Path, texts: dict[str, str]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if is_written(out):  # splits that the data no longer has
            for name in {f'{s}{end}' for s in SPLITS for end in ('.txt', '.json')} - {*texts}:
                (out / name).unlink(missing_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, encoding='utf-8')
    except OSError as error:
        raise FastViTError(f'cannot write to {out}: {error.strerror}') from error


def report(out: Path, found: Found, median: tuple[int, int], texts: dict[str, str]) -> list[str]:
    counts = ', '.join(f'{len(part)} {split}' for split, part in found.splits.items())
    names = ', '.join(found.classes[:20]) + (' ...' if len(found.classes) > 20 else '')
    where = shown(found.root)
    return [
        f'{found.layout} in {where}: {counts} ({found.how}), {median[0]} x {median[1]} pixels',
        f'{len(found.classes)} class{"es" * (len(found.classes) > 1)}: {names}',
        *found.lines,
        f'wrote {", ".join(shown(out / name) for name in texts)}',
        f'next: fastvit train {shown(out / "config.py")}',
    ]


def shown(path: Path) -> str:
    """As the user would write it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
