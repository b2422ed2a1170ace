"""Trains and tests each task's demo; test_processes.py runs it in one process and in two.

python tests/ranks_program.py OUT none|pytorch TASK=CONFIG ...

Everything random is the same for an image wherever it is drawn, and losses are means over images:
without that, two processes would not compute the gradient of one with their images together.
"""

import csv
import hashlib
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fastvit_mm  # noqa: F401  (before mmdet, which needs mmcv's operators)

# isort: split
from mmdet.models.task_modules.samplers import RandomSampler
from mmdet.registry import MODELS as DETECTORS
from mmdet.registry import TASK_UTILS
from mmengine.dist import all_gather, all_gather_object, barrier
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import METRICS, TRANSFORMS
from torch.nn.modules.batchnorm import _BatchNorm

from fastvit_mm import launch
from fastvit_mm.cli.options import argument_parser
from fastvit_mm.demo.config import dicts

BATCH, STEPS, TESTED = 4, 20, 7
STRIDE = dict(mmpretrain=(18, 40))  # every n-th image of training and test set, of all classes
FORMS = ('plain', 'reparam')


@TRANSFORMS.register_module()
class SeedByImage:
    """First in a pipeline: what follows is random by image, not by process."""

    def __call__(self, results):
        name = Path(results['img_path']).name
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return results


@TASK_UTILS.register_module()
class FirstSampler(RandomSampler):
    def random_choice(self, gallery, num):
        return gallery[:num]


@DETECTORS.register_module()
class SummedMaskLoss(torch.nn.Module):
    """mmdet's is the mean over a process's own objects, of which there are more or fewer."""

    use_mask, use_sigmoid = True, False

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, pred, target, label):
        pred = pred[range(len(pred)), label]
        total = F.binary_cross_entropy_with_logits(pred, target, reduction='sum')
        return total / target[:1].numel() / self.images


@METRICS.register_module()
class Order(BaseMetric):
    """The images in the order in which metrics get them."""

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            get = sample.get if isinstance(sample, dict) else lambda k, s=sample: s.metainfo.get(k)
            self.results.append(Path(get('img_path')).name)

    def compute_metrics(self, results):
        return dict(order=results)


class Record(Hook):
    """Losses of the whole batch, and how far the ranks' models are apart in the end."""

    def __init__(self):
        self.losses, self.apart = [], None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(torch.stack(all_gather(outputs['loss'].detach())).mean()))

    def after_train(self, runner):
        state = [v.double().flatten() for v in runner.model.state_dict().values()]
        first, *others = all_gather(torch.cat(state))
        self.apart = max((float((first - one).abs().max()) for one in others), default=0.0)


def load(path, launcher, folder):
    given = [str(path), '--demo', '--launcher', launcher, '--work-dir', str(folder)]
    return launch.load_config(argument_parser('').parse_args(given))


def prepare(cfg, batch, steps=STEPS):
    """Take out of ``cfg`` what depends on how the images are divided: ``batch`` at a time."""
    loader = cfg.train_dataloader
    loader.batch_size = batch
    loader.pop('batch_sampler', None)
    stride = STRIDE.get(cfg.default_scope, (9, 8))[0]
    loader.dataset.indices = [stride * i for i in range(BATCH * steps)]
    loader.dataset.pipeline.insert(0, dict(type='mmengine.SeedByImage'))
    if 'max_epochs' in cfg.train_cfg:
        cfg.train_cfg.max_epochs = 1
    else:
        cfg.train_cfg.max_iters = steps
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg.pop(key)
    cfg.default_hooks.checkpoint.pop('save_best', None)
    cfg.optim_wrapper.optimizer.eps = 1e-2  # Adam divides the noise of rounding by its size
    for node in dicts(cfg.model):
        if 'dropout_ratio' in node:
            node.dropout_ratio = 0
        if 'augments' in (node.get('train_cfg') or {}):  # mixtures of the images of a batch
            node.train_cfg = None
        if node.get('type') == 'RandomSampler':
            node.type = 'FirstSampler'
        if 'loss_mask' in node:
            node['loss_mask'] = dict(type='SummedMaskLoss', images=batch)
        if node.get('type') == 'DetDataPreprocessor':
            node.pad_size_divisor = 96


def train(path, launcher, folder):
    cfg = load(path, launcher, folder)
    prepare(cfg, BATCH // int(os.environ.get('WORLD_SIZE', 1)))
    cfg.sync_bn = 'torch'
    runner = launch.Runner.from_cfg(cfg)
    runner.register_hook(record := Record())
    runner.train()
    unused = runner.cfg.get('find_unused_parameters', False)
    norms = {type(m).__name__ for m in runner.model.modules() if isinstance(m, _BatchNorm)}
    return dict(losses=record.losses, apart=record.apart, unused=unused, norms=sorted(norms))


def test(path, launcher, folder, form):
    cfg = load(path, launcher, folder / form)
    cfg.test_dataloader.batch_size = 1
    stride = STRIDE.get(cfg.default_scope, (9, 8))[1]
    cfg.test_dataloader.dataset.indices = [stride * i for i in range(TESTED)]
    evaluators = cfg.test_evaluator
    evaluators = evaluators if isinstance(evaluators, list) else [evaluators]
    cfg.test_evaluator = [*evaluators, dict(type='mmengine.Order')]
    if form == 'plain':
        report = dict(type='TestReportHook', out_dir=str(folder / 'shown'), draw=True)
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), report]
    if form == 'reparam':
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='ReparameterizeHook')]
    (checkpoint,) = folder.glob('*.pth')
    return launch.test_runner(cfg, str(checkpoint)).test()


def shown(folder):
    """Images and their pictures as a test listed them, and the pictures that are there."""
    barrier()
    with (folder / 'images.csv').open(newline='') as file:
        rows = [(row['image'], row['picture']) for row in csv.DictReader(file)]
    return dict(listed=rows, drawn=sorted(path.name for path in folder.glob('*.jpg')))


def main(out, launcher, *tasks):
    results = {}
    for name, path in (task.split('=') for task in tasks):
        folder = Path(out, name)
        results[name] = train(path, launcher, folder)
        for form in FORMS:
            results[name][form] = test(path, launcher, folder, form)
        results[name]['shown'] = shown(folder / 'shown')
    everyone = all_gather_object(results)
    Path(out, 'results.json').write_text(json.dumps(everyone, default=float))


if __name__ == '__main__':
    launch.run(lambda _: main(*sys.argv[1:]))
