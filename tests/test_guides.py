"""The guides, run as they are written, on generated data and with fewer epochs."""

import glob
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import foreign_layouts as foreign
import pytest
import torch
from mmengine.config import Config
from randomize import randomize

from fastvit_mm import FastViT
from fastvit_mm.cli import COMMANDS
from fastvit_mm.demo.scenes import CLASSES

FOLDER = Path(__file__).parents[1] / 'docs' / 'guides'
PAGES = sorted(FOLDER.glob('*.md'))


def blocks(page, kind):
    return re.findall(rf'```{kind}\n(.*?)```', page.read_text(encoding='utf-8'), re.S)


def commands(page):
    """The commands of a page, without what starts several processes, in order."""
    text = ''.join(blocks(page, 'bash')).replace('\\\n', ' ')
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if '-m' in words:  # torchrun -m fastvit_mm train ... --launcher pytorch
            words = ['fastvit', *words[words.index('-m') + 2 :]]
            at = words.index('--launcher')
            del words[at : at + 2]
        if words:
            yield words


def run(words):
    assert words[0] == 'fastvit' and words[1] in COMMANDS
    words = [found for one in words for found in (sorted(glob.glob(one)) or [one])]
    import_module(f'fastvit_mm.cli.{words[1]}').main(words[2:])


def shortened(config, epochs):
    """The config of a guide, with fewer epochs: what its comments invite to."""
    text = config.read_text()
    text = re.sub(r'^epochs = \d+', f'epochs = {epochs}', text, flags=re.M)
    text = re.sub(r'^warmup = \d+', 'warmup = 1', text, flags=re.M)
    text = re.sub(r'val_interval=\d+', f'val_interval={epochs}', text)
    config.write_text(re.sub(r'interval=\d+\), logger', f'interval={epochs}), logger', text))


def metrics(folder):
    """The last line of the run's log that has a metric."""
    logs = sorted(folder.glob('run/*/vis_data/scalars.json'))
    lines = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    found = {}
    for one in lines:
        found |= {k: v for k, v in one.items() if 'top1' in k or 'mIoU' in k or 'bbox_mAP' in k}
    return found


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A stand-in for the published weights of t8, where a download would be kept."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    path = tmp_path / 'hub/checkpoints/fastvit_t8.apple_in1k.pth.tar'
    torch.save(randomize(FastViT('t8')).state_dict(), path)


def flowers(number):
    foreign.class_folders(Path('data'), number, 'all/{name}/{index:04d}.jpg', area=(0.2, 0.35))
    Path('data/flowers').mkdir()
    for kind, name in (('cross', 'daisy'), ('circle', 'tulip')):
        Path('data/all', kind).rename(Path('data/flowers', name))


def test_every_guide_is_run():
    tested = {*LEARNING, *SHORT, 'from_scratch'}
    assert tested == {page.stem for page in PAGES}


@pytest.mark.parametrize('page', PAGES, ids=[page.stem for page in PAGES])
def test_code_in_guides(page):
    """Each block parses, each command exists, each option is known, and no page is long."""
    assert len(page.read_text().splitlines()) <= 60
    for words in commands(page):
        assert words[0] == 'fastvit' and words[1] in COMMANDS
        module = import_module(f'fastvit_mm.cli.{words[1]}')
        known = Path(module.__file__).read_text()
        known += ''.join(
            p.read_text() for p in (FOLDER.parents[1] / 'fastvit_mm').glob('launch.py')
        )
        known += Path(import_module('fastvit_mm.running.train_options').__file__).read_text()
        for option in words:
            assert not option.startswith('--') or f"'{option}'" in known, option
    for code in blocks(page, 'python'):
        Config.fromstring(code, '.py')
    for target in re.findall(r'\]\((?!http)([^)#]+)', page.read_text()):
        assert (page.parent / target).exists(), target


LEARNING = {
    'own_classes': (lambda: flowers(100), 12, 'accuracy/top1', 60),
    'own_boxes': (lambda: foreign.yolo(Path('data/cells'), 40), 6, 'coco/bbox_mAP_50', 0.02),
    'own_masks': (lambda: foreign.images_and_masks(Path('data/streets'), 30), 10, 'mIoU', 15),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', LEARNING)
def test_guides_for_own_data(name, tmp_path, monkeypatch):
    """What they train is better than chance after a tenth of the guide's time."""
    make, epochs, metric, least = LEARNING[name]
    monkeypatch.chdir(tmp_path)
    make()
    for words in commands(FOLDER / f'{name}.md'):
        run(words)
        if words[1] == 'init':
            shortened(Path(words[2], 'config.py'), epochs)
            folder = Path(words[2])
    assert metrics(folder)[metric] >= least
    assert not name.endswith('classes') or len(list(Path('drawn').iterdir())) >= len(CLASSES)


SHORT = ['published_weights', 'freezing', 'several_gpus']


@pytest.mark.slow
@pytest.mark.parametrize('name', SHORT)
def test_guides_about_training(name, tmp_path, monkeypatch, published):
    """Each command runs, one after another, over the run before."""
    monkeypatch.chdir(tmp_path)
    flowers(20)
    lines = list(commands(FOLDER / f'{name}.md'))
    if lines[0][1] != 'init':
        lines.insert(0, next(commands(FOLDER / 'own_classes.md')))
    first = True
    for words in lines:
        if words[1] == 'train':
            checkpoints = sorted(Path('runs').rglob('epoch_*.pth'))
            if checkpoints and 'load_from=my_checkpoint.pth' in words:
                checkpoints[-1].rename('my_checkpoint.pth')
            words += ['--overwrite'] * (not first and '--overwrite' not in words)
            first = False
        run(words)
        if words[1] == 'init':
            shortened(Path(words[2], 'config.py'), 2)
    assert list(Path('runs').rglob('epoch_2.pth'))
