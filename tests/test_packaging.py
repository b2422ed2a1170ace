"""What pip installs, where the configs end up and what an environment made by make is like."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    'onedl': {
        'onedl-mmengine',
        'onedl-mmcv',
        'onedl-mmdetection',
        'onedl-mmsegmentation',
        'onedl-mmpretrain',
    },
    'openmmlab': {'mmengine', 'mmcv-lite', 'mmdet', 'mmsegmentation', 'mmpretrain'},
}
made_by_make = pytest.mark.skipif(
    not Path(sys.prefix, '.installed').exists(), reason='the environment was not made by make'
)


def run(*command, **kwargs):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **kwargs
    )
    return done.returncode, done.stdout, done.stderr


def python(code, **kwargs):
    return run(sys.executable, '-W', 'ignore', '-c', code, **kwargs)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """A copy of the sources: builds leave files behind and other tests may run meanwhile."""
    tree = tmp_path_factory.mktemp('tree')
    for name in ('fastvit_mm', 'configs', 'tools'):
        ignore = shutil.ignore_patterns('__pycache__', '.mim')
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    if (ROOT / 'model-index.yml').exists():
        shutil.copy(ROOT / 'model-index.yml', tree)
    return tree


@pytest.fixture(scope='module')
def wheel(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    flags = ('--no-deps', '--no-build-isolation', '--no-index', '-q')
    code, out, err = run(sys.executable, '-m', 'pip', 'wheel', *flags, '-w', folder, tree)
    assert code == 0, out + err
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def requirements(wheel):
    with zipfile.ZipFile(wheel) as file:
        name = next(n for n in file.namelist() if n.endswith('.dist-info/METADATA'))
        found = Parser().parsestr(file.read(name).decode())
    return [Requirement(line) for line in found.get_all('Requires-Dist')]


def needed(requirements, extra=''):
    return {
        req.name: req
        for req in requirements
        if req.marker is None or req.marker.evaluate({'extra': extra})
    }


def test_without_an_extra_only_torch_and_torchvision_are_needed(requirements):
    assert set(needed(requirements)) == {'torch', 'torchvision'}


@pytest.mark.parametrize('family', FAMILIES)
def test_an_extra_names_one_whole_family_and_nothing_of_the_other(requirements, family):
    other = 'openmmlab' if family == 'onedl' else 'onedl'
    found = set(needed(requirements, family))
    assert found >= FAMILIES[family]
    assert not found & FAMILIES[other]


def test_the_test_extra_brings_in_no_family(requirements):
    assert not set(needed(requirements, 'test')) & (FAMILIES['onedl'] | FAMILIES['openmmlab'])


def test_the_torch_without_a_torchvision_is_left_out(requirements):
    torch = needed(requirements)['torch'].specifier
    assert '2.14.1' in torch
    assert '2.13.0' not in torch
    assert '2.13.0+cpu' not in torch


def test_every_package_of_the_families_is_pinned(requirements):
    pins = {req.name for req in constraints()}
    for extra in (*FAMILIES, 'test'):
        assert set(needed(requirements, extra)) <= pins


def shipped():
    """The files of configs/ and tools/, as the wheel is to name them."""
    return {
        'fastvit_mm/.mim/' + path.relative_to(ROOT).as_posix()
        for folder in ('configs', 'tools')
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


def test_the_wheel_holds_the_configs_and_the_package(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert any(name.endswith('.py') for name in shipped())
    assert names >= shipped() | {'fastvit_mm/__init__.py', 'fastvit_mm/.mim/model-index.yml'}
    assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {'fastvit_mm'}
    assert any(name.endswith('LICENSE') for name in names)


def test_the_source_archive_is_a_whole_checkout(tmp_path):
    """Its tools run."""
    folders = ('configs', 'docs', 'fastvit_mm', 'tests', 'tools')
    tree, unpacked = tmp_path / 'tree', tmp_path / 'unpacked'
    ignore = shutil.ignore_patterns('__pycache__', '.mim')
    for name in folders:
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith('.'):
            shutil.copy(path, tree)
    wanted = {path.relative_to(tree) for path in tree.rglob('*') if path.is_file()}
    build = f'from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})'
    code, out, err = python(build, cwd=tree)
    assert code == 0, out + err
    shutil.unpack_archive(next(tmp_path.glob('*.tar.gz')), unpacked, filter='data')
    (root,) = unpacked.iterdir()
    assert not wanted - {path.relative_to(root) for path in root.rglob('*')}
    env = {**os.environ, 'PYTHONPATH': str(root)}
    code, out, err = run(sys.executable, root / 'tools/benchmark.py', '--help', cwd=root, env=env)
    assert code == 0 and 'deploy' in out, err


def test_a_build_leaves_the_package_in_the_tree_as_it_was(wheel, tree):
    assert not (tree / 'fastvit_mm' / '.mim').exists()


@pytest.mark.slow
def test_a_second_wheel_has_no_config_that_was_removed(tree, wheel, tmp_path):
    shutil.copytree(tree, tmp_path / 'tree')
    extra = tmp_path / 'tree' / 'configs' / 'removed.py'
    flags = ('--no-deps', '--no-build-isolation', '--no-index', '-q', '-w', tmp_path)
    for there in (True, False):
        if there:
            extra.write_text('')
        else:
            extra.unlink()
        code, out, err = run(sys.executable, '-m', 'pip', 'wheel', *flags, tmp_path / 'tree')
        assert code == 0, out + err
        with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as file:
            assert ('fastvit_mm/.mim/configs/removed.py' in file.namelist()) == there


LOAD = """
import site, sys
target, packages, expected, *names = sys.argv[1:]
site.addsitedir(target)  # unlike PYTHONPATH, this follows .pth files
sys.path.append(packages)
import fastvit_mm
assert fastvit_mm.__file__.startswith(expected), fastvit_mm.__file__
from mmengine.config import Config
for name in names:
    with open('child.py', 'w') as file:
        file.write(f"_base_ = 'fastvit_mm::{name}'\\nmarker = 1\\n")
    config = Config.fromfile('child.py')
    assert config.marker == 1 and 'FastViT' in config.pretty_text, name
print('loaded', len(names))
"""


def load_configs(target, expected, cwd):
    """Loads a child of every config in an interpreter that sees `target` as its site-packages."""
    names = sorted(
        name.removeprefix('fastvit_mm/.mim/configs/')
        for name in shipped()
        if name.endswith('.py') and '/configs/' in name and '_base_' not in name.split('/')
    )
    # -S keeps an editable install of the environment from being found first, -E a PYTHONPATH
    packages = sysconfig.get_paths()['purelib']
    command = (sys.executable, '-S', '-E', '-W', 'ignore', '-c', LOAD)
    code, out, err = run(*command, target, packages, expected, *names, cwd=cwd)
    assert code == 0, err
    assert out.splitlines()[-1] == f'loaded {len(names)}'


@pytest.mark.slow
def test_a_config_inherits_from_the_installed_package(wheel, tmp_path):
    target = tmp_path / 'site'
    flags = ('--no-deps', '--no-index', '-q', '--target', target)
    code, out, err = run(sys.executable, '-m', 'pip', 'install', *flags, wheel)
    assert code == 0, out + err
    load_configs(target, target, tmp_path)


@pytest.mark.slow
def test_a_config_inherits_from_an_editable_install(tree, tmp_path):
    target = tmp_path / 'site'
    tree = shutil.copytree(tree, tmp_path / 'tree')
    # what pip calls for -e
    build = f'from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})'
    code, out, err = python(build, cwd=tree)
    assert code == 0, out + err
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as file:
        file.extractall(target)
    assert (tree / 'fastvit_mm' / '.mim' / 'configs').resolve() == tree / 'configs'
    load_configs(target, tree, tmp_path)


HIDE = """
import sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] not in ('mmengine', 'mmcv'):
            return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
import fastvit_mm
"""


def test_without_a_family_the_import_says_what_to_install():
    code, _, err = python(HIDE, cwd=ROOT)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith('ImportError: ')
    assert "in its checkout, pip install '.[onedl]'" in last
    assert "pip install '.[openmmlab]'" in last


@pytest.mark.skipif(shutil.which('make') is None, reason='make is not installed')
def test_make_says_in_one_line_that_python_is_too_old(tmp_path):
    old = tmp_path / 'python3'
    old.write_text('#!/bin/sh\nexit 1\n')
    old.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith('MAKE')}
    code, out, err = run(
        'make', 'lint', f'PYTHON={old}', f'VENV={tmp_path / "venv"}', cwd=ROOT, env=env
    )
    assert code == 2
    assert out == ''
    assert len(err.splitlines()) == 1
    assert 'Python 3.10 or newer' in err
    assert not (tmp_path / 'venv').exists()


def constraints():
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith('#')]


def test_every_constraint_is_one_exact_version_per_python():
    for minor in range(10, 15):
        env = {'python_version': f'3.{minor}'}
        names = [r.name for r in constraints() if r.marker is None or r.marker.evaluate(env)]
        assert len(names) == len(set(names))
    assert all(re.fullmatch(r'==[\w.]+', str(req.specifier)) for req in constraints())


@made_by_make
def test_the_installed_versions_are_those_that_are_pinned():
    # Of the environment alone: setuptools, once imported, adds a folder of its own copies.
    folders = list({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})
    installed = {d.name: d.version for d in metadata.distributions(path=folders)}
    installed = {re.sub('[-_.]+', '-', k).lower(): v for k, v in installed.items()}
    for req in constraints():
        version = installed.get(re.sub('[-_.]+', '-', req.name).lower())
        if version is not None and (req.marker is None or req.marker.evaluate()):
            assert version in req.specifier, req.name


@made_by_make
def test_exactly_one_family_is_installed():
    installed = {re.sub('[-_.]+', '-', d.name).lower() for d in metadata.distributions()}
    assert sum(names <= installed for names in FAMILIES.values()) == 1
    assert sum(bool(names & installed) for names in FAMILIES.values()) == 1


@made_by_make
def test_opencv_is_the_one_that_needs_no_libgl():
    folder = Path(util.find_spec('cv2').submodule_search_locations[0])
    assert 'headless = True' in (folder / 'version.py').read_text()
    libraries = [str(path) for path in folder.glob('cv2*.so')]
    assert libraries
    if shutil.which('ldd') is None:
        pytest.skip('ldd is not installed')
    # with the libraries that the libraries need
    code, out, err = run('ldd', *libraries)
    assert code == 0, err
    assert 'libGL' not in out
    assert 'not found' not in out
