"""docs/deploy.md as written: its commands, its Python, and its page in a browser."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import pytest
import torch
from randomize import randomize
from test_tools import CLASSIFICATION, DETECTION, ROOT, SEGMENTATION, load_tool, shallow

import fastvit_mm

PAGE = (ROOT / 'docs' / 'deploy.md').read_text()
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```', PAGE, re.S | re.M)
BROWSER = ROOT / 'tests' / 'browser'
CLASSIFY, DETECT, SEGMENT, OPENVINO, TORCH = (code for kind, code in BLOCKS if kind == 'python')
COMMANDS = [line for kind, code in BLOCKS if kind == 'bash' for line in code.splitlines()]
EXPORT = 'python tools/export.py my_config.py my_checkpoint.pth'
FEW = """
# Few detections, as each takes its time.
model['test_cfg'] = dict(rpn=dict(max_per_img=100), rcnn=dict(score_thr=0.5, max_per_img=20))
"""
SMALL = ('--size', '128', '192')  # what a file for any size is verified with


def arguments(out):
    """Of the page's command that writes a file: a whole one, or what is added for other models."""
    for line in COMMANDS:
        if line.startswith(EXPORT) and line.endswith(out):
            return line.removeprefix(EXPORT)
    return re.search(rf'`(--[^`]*{re.escape(out)})`', PAGE)[1]


def picture(path, height, width, seed):
    """Large patches of colour under a little noise: no two images look alike to a network."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (5, 7, 3)).astype(np.float32)
    patches = cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)
    image = patches + rng.normal(0, 20, (height, width, 3))
    assert cv2.imwrite(str(path), image.clip(0, 255).astype(np.uint8))
    return path


class Project:
    """A folder with what the page starts from: my_config.py and my_checkpoint.pth."""

    def __init__(self, task, folder):
        self.folder = folder
        config = shallow(task, folder).rename(folder / 'my_config.py')
        if task == DETECTION:
            config.write_text(config.read_text() + FEW)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # a detector's heads stay as they are initialized
            model = fastvit_mm.init_model(config)
        randomize(model.backbone if task == DETECTION else model)
        if task == DETECTION:
            with torch.no_grad():  # sure of something, but not of all the same
                model.rpn_head.rpn_cls.weight *= 0.2
                model.roi_head.bbox_head.fc_cls.weight *= 40
                model.roi_head.mask_head.conv_logits.weight *= 30
        weights = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta))
        torch.save(weights, folder / 'my_checkpoint.pth')
        self.model = model

    def export(self, out, *more):
        """Once, as the page says; ``more`` as a person would add it."""
        if not (self.folder / out).exists():
            config, checkpoint = self.folder / 'my_config.py', self.folder / 'my_checkpoint.pth'
            args = [config, checkpoint, *shlex.split(arguments(f'--out {out}')), *more]
            before = os.getcwd()
            os.chdir(self.folder)
            try:
                load_tool('export').main([str(a) for a in args])
            finally:
                os.chdir(before)
        return self.folder / out

    def top5(self, image):
        """Names and probabilities by PyTorch."""
        scores = fastvit_mm.inference(self.model, image)['pred_scores']
        best = scores.argsort()[:-6:-1]
        return [self.model.dataset_meta['classes'][i] for i in best], scores[best]


def check_top5(texts, project, images):
    assert len(texts) == len(images)
    for text, image in zip(texts, images, strict=True):
        names, scores = project.top5(image)
        lines = [line.split(' ', 1) for line in text.strip().splitlines()]
        assert [name for _, name in lines] == names
        np.testing.assert_allclose([float(p) for p, _ in lines], scores, atol=1e-4)
    assert len(set(texts)) == len(texts)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    project = Project(CLASSIFICATION, tmp_path_factory.mktemp('classifier'))
    project.export('model.onnx')
    return project


def shell(command, folder):
    """A line of a page in a shell whose python is this one."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    subprocess.run(command, shell=True, check=True, cwd=folder, env={**os.environ, 'PATH': path})


def test_a_classifier(classifier):
    """Images of any size, JPEG among them: resizing and cropping are the config's."""
    (classifier.folder / 'classify.py').write_text(CLASSIFY)
    texts, images = [], []
    for seed, (name, *size) in enumerate(
        [('a.jpg', 350, 527), ('b.png', 301, 217), ('c.jpg', 640, 480)]
    ):
        images.append(picture(classifier.folder / name, *size, seed))
        run = subprocess.run(
            [sys.executable, 'classify.py', name],
            cwd=classifier.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        texts.append(run.stdout)
    check_top5(texts, classifier, images)


def test_the_pages_numbers():
    """The table of the two sizes is that of the configs."""
    from mmengine.config import Config

    rows = re.findall(r'^\| (.*) \| (\d+) \| (\d+) \|$', PAGE, re.M)
    seen = set()
    for variants, short, size in rows:
        names = variants.lower().removesuffix(' at 384').split(', ')
        for name in names:
            suffix = '384_in1k' if size == '384' else 'in1k'
            path = ROOT / f'configs/classification/fastvit_{name}_{suffix}.py'
            seen.add(path.name)
            for file in (path, path.with_stem(path.stem.replace('in1k', 'dist_in1k'))):
                if file.exists():
                    steps = Config.fromfile(file).test_dataloader.dataset.pipeline
                    assert (steps[1].scale, steps[2].crop_size) == (int(short), int(size)), file
    configs = {p.name for p in (ROOT / 'configs/classification').glob('*.py')}
    assert seen == {name for name in configs if 'dist' not in name and 'mci' not in name}


@pytest.mark.parametrize('code, out', [(OPENVINO, 'model.xml'), (TORCH, 'model.pt2')])
def test_other_runtimes(classifier, code, out, monkeypatch):
    """What follows the first script, with its image."""
    classifier.export(out, '--with-preprocess', '--output', 'probabilities')
    image = picture(classifier.folder / 'image.png', 320, 400, seed=7)
    monkeypatch.chdir(classifier.folder)
    monkeypatch.setattr(sys, 'argv', ['classify.py', 'image.png'])
    exec(CLASSIFY, names := {})
    wanted = names.pop('probabilities')
    exec(code, names)
    np.testing.assert_allclose(names['probabilities'], wanted, atol=1e-5)
    np.testing.assert_allclose(sorted(wanted)[:-6:-1], classifier.top5(image)[1], atol=1e-5)


def test_core_ml(classifier, capfd):
    classifier.export('FastViT.mlpackage')
    assert 'operators as expected' in capfd.readouterr().out


@pytest.mark.slow
def test_a_detector(tmp_path, monkeypatch):
    project = Project(DETECTION, tmp_path)
    project.export('detector.onnx', *SMALL)
    image = picture(tmp_path / 'image.png', 150, 211, seed=1)
    image.rename(tmp_path / 'image.jpg')
    monkeypatch.chdir(tmp_path)
    exec(DETECT, names := {})
    wanted = fastvit_mm.inference(project.model, 'image.jpg').pred_instances
    assert len(names['boxes']) == len(wanted) > 5
    np.testing.assert_allclose(names['scores'], wanted.scores, atol=1e-3)
    np.testing.assert_allclose(names['boxes'], wanted.bboxes, atol=0.5)
    assert (names['labels'] == wanted.labels.numpy()).all()
    width, height = names['size']
    assert names['masks'].shape == (len(wanted), height, width)


@pytest.mark.slow
def test_a_segmentor(tmp_path, monkeypatch):
    project = Project(SEGMENTATION, tmp_path)
    project.export('segmentor.onnx', *SMALL)
    monkeypatch.chdir(tmp_path)
    for height, width in ((512, 530), (301, 420)):
        picture(tmp_path / 'image.png', height, width, seed=2).rename('image.jpg')
        exec(SEGMENT, names := {})
        got = names['labels']
        wanted = fastvit_mm.inference(project.model, 'image.jpg').pred_sem_seg.data[0].numpy()
        assert got.shape == wanted.shape and len(np.unique(wanted)) > 2
        if height == 512:  # nothing to resize
            assert (got == wanted).mean() > 0.999
        shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        near = np.any([got == np.roll(wanted, shift, (0, 1)) for shift in shifts], axis=0)
        assert near.mean() > 0.999


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(classifier):
    """The address of the classifier's folder."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(classifier.folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def packages(pytestconfig):
    """A folder with the npm packages, kept between runs."""
    for program in ('node', 'npm'):
        if not shutil.which(program):
            pytest.skip(f'{program} is not installed')
    folder = pytestconfig.cache.mkdir('browser')
    for file in BROWSER.iterdir():
        shutil.copy(file, folder)
    quick = ['--prefer-offline', '--fetch-retries=1', '--no-audit', '--no-fund']
    careful = ['--engine-strict', '--ignore-scripts', '--no-package-lock']
    try:
        install = subprocess.run(
            ['npm', 'install', *quick, *careful],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        pytest.skip('npm install takes longer than 300 s')
    if install.returncode:
        reasons = [s for s in install.stderr.splitlines() if s.startswith('npm error')]
        pytest.skip(f'npm install fails: {" ".join(reasons[:3])}')
    return folder


@pytest.mark.slow
def test_the_page_in_a_browser(classifier, served, packages):
    """Images with the short side that is to be, as a canvas resizes unlike Pillow."""
    folder = classifier.folder
    (folder / 'index.html').write_text(next(code for kind, code in BLOCKS if kind == 'html'))
    (folder / 'node_modules').symlink_to(packages / 'node_modules')
    version = json.loads((BROWSER / 'package.json').read_text())['dependencies']['onnxruntime-web']
    assert f'npm install onnxruntime-web@{version}' in COMMANDS
    shell(next(line for line in COMMANDS if line.endswith('labels.json')), folder)
    sizes = [(284, 284), (284, 427), (393, 284)]
    images = [picture(folder / f'{i}.png', *size, seed=i) for i, size in enumerate(sizes)]
    names = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
    chromium = os.environ.get('CHROME') or next(filter(None, map(shutil.which, names)), '')
    run = subprocess.run(
        ['node', 'run.mjs', served, chromium, *map(str, images)],
        cwd=packages,
        env={**os.environ, 'TMPDIR': str(packages)},  # where the browser is unpacked
        capture_output=True,
        text=True,
        timeout=180,
    )
    if run.returncode == 3:
        pytest.skip(run.stderr.strip().splitlines()[0])
    assert run.returncode == 0, run.stderr
    check_top5(json.loads(run.stdout), classifier, images)
