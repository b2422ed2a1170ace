"""A whole run on generated data: train a segmenter, test it in both forms, compare them."""

import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mmengine.config import Config

import fastvit_mm
from fastvit_mm import configs, launch
from fastvit_mm.demo import apply_demo
from fastvit_mm.reparameterize import distance

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

CONFIG = 'fastvit_mm::segmentation/fpn_fastvit_sa36_ade20k.py'


def command(name: str, *args: str) -> None:
    """Run a command like a user; if it fails, exit with its code."""
    words = [name, CONFIG, *args, '--demo']
    print(f'\n$ fastvit {shlex.join(words)}', flush=True)
    code = subprocess.run([sys.executable, '-m', 'fastvit_mm', *words]).returncode
    if code:
        sys.exit(code)


def milliseconds(models: list, inputs, rounds: int = 15) -> list[float]:
    """Median time of one forward pass of each model, called in turns."""
    times = [[] for _ in models]
    for turn in range(rounds + 3):
        for model, own in zip(models, times, strict=True):
            start = time.perf_counter()
            model(inputs, mode='tensor')
            if turn >= 3:  # the first calls warm up
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(t) for t in times]


def draw(rows: list, classes: list[str], palette: list, path: Path) -> None:
    """Image, truth and prediction side by side, for each of ``rows``.

    Args:
        rows: (image, truth, prediction): (H, W, 3) RGB and twice (H, W) labels, 255 for none.
    """
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(palette)] = palette
    figure, axes = plt.subplots(
        len(rows), 3, figsize=(7.2, 2.3 * len(rows) + 0.8), layout='constrained', squeeze=False
    )
    for line, (image, truth, prediction) in zip(axes, rows, strict=True):
        for axis, picture in zip(line, (image, colors[truth], colors[prediction]), strict=True):
            axis.imshow(picture, interpolation='nearest')
            axis.set_axis_off()
    for axis, title in zip(axes[0], ('image', 'truth', 'prediction'), strict=True):
        axis.set_title(title)
    present = sorted({int(c) for _, t, p in rows for c in (*np.unique(t), *np.unique(p))} - {255})
    handles = [Patch(color=colors[c] / 255, label=classes[c]) for c in present]
    handles.append(Patch(facecolor='white', edgecolor='gray', label='unlabelled'))
    figure.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def whole_run() -> None:
    """Train and test SA36 for segmentation as a user would, and print how its forms compare."""
    work_dir = Path('work_dirs', 'demo', Path(CONFIG).stem)
    begin = time.time()
    command('train', '--work-dir', str(work_dir), '--overwrite')
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    trained = time.time()
    metrics = {}
    for form, option in (('training form', []), ('deploy form', ['--reparam'])):
        out = work_dir / f'{form.replace(" ", "_")}.json'
        command('test', str(checkpoint), *option, '--out', str(out), '--work-dir', str(work_dir))
        metrics[form] = json.loads(out.read_text())['mIoU']

    cfg = apply_demo(Config.fromfile(configs.find(CONFIG)))
    cfg.work_dir, cfg.log_level = str(work_dir), 'WARNING'
    runner = launch.test_runner(cfg, str(checkpoint))
    runner.load_or_resume()
    model = runner.model.eval()
    merged = fastvit_mm.reparameterize(model)

    dataset = runner.test_dataloader.dataset
    rows = []
    for index in range(4):
        item = dataset[index]
        sample = model.data_preprocessor({k: [v] for k, v in item.items()}, False)
        prediction = merged.predict(sample['inputs'], sample['data_samples'])[0]
        image = np.asarray(plt.imread(item['data_samples'].img_path))
        truth = item['data_samples'].gt_sem_seg.data[0].numpy()
        rows.append((image, truth, prediction.pred_sem_seg.data[0].cpu().numpy()))
    picture = work_dir / 'demo.png'
    draw(rows, dataset.metainfo['classes'], dataset.metainfo['palette'], picture)

    inputs = sample['inputs']
    difference = distance(merged(inputs, mode='tensor'), model(inputs, mode='tensor'))
    slow, fast = milliseconds([model, merged], inputs)
    print(
        f'\nFastViT-SA36 with Semantic FPN, from scratch on the demo data\n'
        f'  trained in            {trained - begin:.0f} s\n'
        f'  mIoU, training form   {metrics["training form"]:.2f}\n'
        f'  mIoU, deploy form     {metrics["deploy form"]:.2f}\n'
        f'  logits differ by      {difference:.1e} of their largest\n'
        f'  deploy form           {slow / fast:.2f} x as fast ({fast:.0f} against {slow:.0f} ms '
        f'an image of {inputs.shape[-1]} x {inputs.shape[-2]})\n'
        f'  picture               {picture}'
    )
