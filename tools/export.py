"""Export a model to a file that runs elsewhere, and check that it computes the same:
python tools/export.py CONFIG CHECKPOINT --format onnx|torch|openvino|coreml --out FILE ...
"""

import os
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import mmcv
import numpy as np
from mmengine.config import Config
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

import fastvit_mm
from fastvit_mm import data, launch
from fastvit_mm.demo.scenes import make_scenes
from fastvit_mm.errors import FastViTError
from fastvit_mm.export import FORMATS, export, verify

# For configs that do not give a test size: the paper's.
SIZES = dict(mmpretrain=(256, 256), mmseg=(512, 512), mmdet=(800, 1344))


def main(argv: list[str] | None = None) -> None:
    parser = launch.config_parser('Export a model with merged branches, and verify the file.')
    parser.add_argument('checkpoint', help='file, URL or short name of the weights')
    parser.add_argument('--format', choices=FORMATS, default='onnx', help='format of FILE (onnx)')
    suffixes = ', '.join(f.suffix for f in FORMATS.values())
    parser.add_argument('--out', required=True, help=f'file to write: {suffixes}')
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help="image size (the config's test size)"
    )
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='accept any number of images of any size (detectors always accept any size)',
    )
    parser.add_argument('--batch', type=int, default=1, help='images per batch (1)')
    parser.add_argument('--half', action='store_true', help='compute in float16 (torch: bfloat16)')
    parser.add_argument(
        '--with-preprocess',
        action='store_true',
        help='take uint8 RGB, (B, H, W, 3), and normalize inside',
    )
    parser.add_argument(
        '--output',
        choices=['logits', 'probabilities', 'labels'],
        help='output of a classifier (logits, probabilities) or a segmentor (logits, labels)',
    )
    parser.add_argument(
        '--with-hand-model',
        action='store_true',
        help="put MANO's arrays into the file, which its licence does not let you pass on",
    )
    args = parser.parse_args(argv)

    chosen, path = FORMATS[args.format], Path(args.out)
    if path.suffix != chosen.suffix:
        raise FastViTError(
            f'--out {path}: with --format {args.format}, give a file that ends in {chosen.suffix}'
        )
    if args.batch < 1 or min(args.size or [32]) < 32:
        raise FastViTError('--batch must be at least 1 and --size at least 32 32')
    cfg = launch.load_config(args)
    size = tuple(args.size) if args.size else size_of(cfg)
    model = fastvit_mm.init_model(cfg, args.checkpoint)
    info = export(
        model,
        path,
        args.format,
        size=size,
        batch=args.batch,
        dynamic=args.dynamic,
        preprocess=args.with_preprocess,
        half=args.half,
        output='vertices' if args.with_hand_model else args.output,
    )
    try:
        verdict = verify(model, path, images(cfg, size, info['size'] is None))
    except BaseException:
        move_aside(path)  # it was not verified
        raise
    if not verdict.explained:
        aside = move_aside(path)
        print(f'{path} does NOT compute what the model does: {verdict.text}; it is now {aside}')
        sys.exit(1)
    print(f'{path}: {verdict.text}')
    print(f'takes  {description(info)}')
    print(f'gives  {", ".join(info["outputs"])}; {len(info["classes"])} class names inside')


def description(info: dict) -> str:
    batch, size = info['batch'] or 'B', info['size'] or ('H', 'W')
    if info['preprocess']:
        return f'uint8 RGB ({batch}, {size[0]}, {size[1]}, 3)'
    return f'float32 RGB, normalized, ({batch}, 3, {size[0]}, {size[1]})'


def size_of(cfg: Config) -> tuple[int, int]:
    """Height and width that the config's test pipeline produces, if it gives them."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
    size = None
    for step in dataset.get('pipeline', []):
        size = step.get('crop_size') or step.get('scale') or size
    if size is None:
        return SIZES[cfg.default_scope]
    if isinstance(size, int):
        return size, size
    short, long = min(size), max(size)
    if cfg.default_scope == 'mmdet':  # (long, short); most images are wide
        return short, -(-long // 32) * 32
    return short, short


def images(cfg: Config, size: tuple[int, int], dynamic: bool) -> list[np.ndarray]:
    """Noise and two real images, uint8 RGB; of different sizes if the file takes any size."""
    real = []
    for path in real_files(cfg):
        image = mmcv.imread(str(path), channel_order='rgb')
        if image is not None:
            real.append(image)
        if len(real) == 2:
            break
    if len(real) < 2:
        print('no test set found: verifying with generated scenes', file=sys.stderr)
        real = [scene.image for _, scene in islice(make_scenes('imagenet', 'val'), 2)]
    sizes = [size] * 3
    if dynamic:
        sizes[2] = tuple(max(64, round(n * 0.75 / 32) * 32) for n in size)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return [noise] + [mmcv.imresize(i, s[::-1]) for i, s in zip(real, sizes[1:], strict=True)]


def real_files(cfg: Config) -> Iterator[Path]:
    """Files of the config's test set, in a fixed order."""
    for dataset in data.datasets_in(cfg.get('test_dataloader')):
        for part in data.expected_paths(dataset):
            for folder, folders, files in os.walk(Path(dataset.get('data_root') or '', part)):
                folders.sort()
                yield from (
                    Path(folder, f)
                    for f in sorted(files)
                    if has_file_allowed_extension(f, IMG_EXTENSIONS)
                )
        return


def move_aside(path: Path) -> Path:
    """Rename a file that must not be used, and the weights that OpenVINO saves next to it."""
    aside = path.with_name(f'{path.stem}.failed{path.suffix}')
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
    if (weights := path.with_suffix('.bin')).exists() and path.suffix == '.xml':
        weights.replace(aside.with_suffix('.bin'))
    return aside


if __name__ == '__main__':
    launch.run(main)
