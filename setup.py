"""Packaging: what is installed, and its requirements; other settings are in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# The two families install the same import names (mmengine, mmcv, mmdet, ...), so the package itself
# cannot require either of them: it would overwrite the other. The upper bounds are those that the
# families assert on import.
EXTRAS = {
    'onedl': [
        'onedl-mmengine>=0.10.12',
        'onedl-mmcv>=2.3.6,<2.4',
        'onedl-mmdetection>=3.5.1',
        'onedl-mmsegmentation>=1.4.2',
        'onedl-mmpretrain>=1.3.6',
    ],
    'openmmlab': [
        'mmengine>=0.10.7',
        # the compiled mmcv has no wheel for current torch versions and needs a compiler
        'mmcv-lite>=2.1.0,<2.2',
        'mmdet>=3.3.0',
        'mmsegmentation>=1.2.2',
        'mmpretrain>=1.2.0',
        # used but not declared: mmseg's text encoder
        'ftfy',
        'regex',
        # used but not declared: mmengine needs pkg_resources, which later versions lack
        'setuptools<81',
    ],
    # writing and running the files of `tools/export.py --format`
    'onnx': ['onnx>=1.17', 'onnxruntime>=1.20', 'onnxscript>=0.5'],
    'openvino': ['openvino>=2025.0'],
    'coreml': ['coremltools>=9.0'],
    'tensorboard': ['tensorboard>=2.16'],
    # corruptions and lists of classes; imagecorruptions itself does not run on numpy 2
    'robustness': ['imagecorruptions-imaug>=1.1.5', 'timm>=1.0.31'],
    'cam': ['grad-cam>=1.5.4'],  # fastvit infer --cam
    'test': [
        'hypothesis>=6.100',
        'pytest',
        'pytest-randomly',
        'pytest-timeout>=2.4',
        'pytest-xdist',
        'ruff',
        'setuptools>=70.1',
        'smplx>=0.1.28',  # what the hand layer is held against; its licence is non-commercial
        'torchao>=0.18',
    ],
}
for extra in ('onnx', 'openvino', 'coreml', 'tensorboard', 'robustness', 'cam'):
    EXTRAS['test'] += EXTRAS[extra]


class BuildPy(build_py):
    """Adds configs/, tools/ and model-index.yml as `fastvit_mm/.mim`, where `fastvit_mm::` and
    OpenMMLab's `mim` look."""

    def run(self):
        if self.editable_mode:
            self.put(ROOT / 'fastvit_mm' / '.mim', link=True)
        else:
            # an earlier build may have left files here that no longer exist
            shutil.rmtree(Path(self.build_lib, 'fastvit_mm'), ignore_errors=True)
            self.put(Path(self.build_lib, 'fastvit_mm', '.mim'), link=False)
        super().run()

    @staticmethod
    def put(target, link):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in ('configs', 'tools', 'model-index.yml'):
            source = ROOT / name
            if link:
                (target / name).symlink_to(Path('..', '..', name))
            elif source.is_dir():
                ignore = shutil.ignore_patterns('__pycache__', '*.pyc')
                shutil.copytree(source, target / name, ignore=ignore)
            else:
                shutil.copy(source, target / name)


def version():
    text = (ROOT / 'fastvit_mm' / '__init__.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '(.+)'", text, re.MULTILINE).group(1)


def readme():
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


setup(
    name='fastvit_mm',
    version=version(),
    description='The FastViT backbone for the OpenMMLab stack',
    long_description=readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['fastvit_mm', 'fastvit_mm.*']),
    python_requires='>=3.10',
    # Before 2.10.0 a safe load of a malicious file can run code (CVE-2026-24747, CVE-2025-32434);
    # before 2.9, torch.export does not accept detectors. 2.13.0 exists only for the CPU and has no
    # torchvision; each torchvision requires its own torch.
    install_requires=['torch>=2.10,!=2.13.0', 'torchvision>=0.25'],
    extras_require=EXTRAS,
    entry_points={'console_scripts': ['fastvit = fastvit_mm.cli:main']},
    cmdclass={'build_py': BuildPy},
    zip_safe=False,
)
