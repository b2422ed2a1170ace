"""Training runs of a second that draw from every generator, in processes that can be killed."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch.utils.data import Dataset

from fastvit_mm import launch

IMAGES, BATCH, EPOCHS = 12, 2, 3
PER_EPOCH = IMAGES // BATCH
ITERATIONS = EPOCHS * PER_EPOCH


class Drawn(Dataset):
    """Images of noise; reading one draws from the generators of Python, numpy and PyTorch."""

    metainfo = dict(classes=('a',))

    def __len__(self):
        return IMAGES

    def get_data_info(self, i):
        return dict(img_path=f'image_{i}.jpg')

    def __getitem__(self, i):
        image = torch.rand(3, 4, 4) + np.random.rand() + random.random() + i
        return dict(inputs=image, target=image.mean().view(1))


class Named:
    def __init__(self, i):
        self.img_path = f'image_{i}.jpg'


class NamedDrawn(Drawn):
    def __getitem__(self, i):
        return dict(super().__getitem__(i), data_samples=Named(i))


class Net(BaseModel):
    """Draws in its forward pass as well, like drop path and mixup."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3))
        self.head = nn.Linear(4, 1)

    def forward(self, inputs, target=None, mode='tensor'):
        x = torch.stack(list(inputs)) * (1 + 0.1 * np.random.rand() * self.training)
        out = self.head(self.body(x).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=F.l1_loss(out, torch.stack(list(target))))
        return list(out) if mode == 'predict' else out


class Wander(BaseMetric):
    """A score that is at its best now and then; computing it draws."""

    def process(self, data_batch, data_samples):
        np.random.rand(), torch.rand(1)
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(score=float(torch.cat(results).sum() * 1e4 % 1))


class At(Hook):
    """Does something when an iteration is done, or in the validation after it."""

    priority = 'VERY_LOW'

    def __init__(self, iteration, action, in_validation=False):
        self.iteration, self.action, self.in_validation = iteration, action, in_validation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration and not self.in_validation:
            self.action(runner)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration and self.in_validation:
            self.action(runner)


def die(runner=None):
    os.kill(os.getpid(), 9)


def make_run(folder, by_epoch=True, workers=0, hooks=(), resume=False, kind=launch.Runner, **more):
    """A runner for ``EPOCHS`` epochs or as many iterations."""
    loader = dict(
        dataset=Drawn(), batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    if by_epoch:
        loop = dict(by_epoch=True, max_epochs=EPOCHS, val_interval=1)
        slow = dict(type='CosineAnnealingLR', T_max=EPOCHS, by_epoch=True)
    else:
        loop = dict(type='IterBasedTrainLoop', max_iters=ITERATIONS, val_interval=3)
        slow = dict(type='PolyLR', end=ITERATIONS, by_epoch=False)
    checkpoint = dict(
        type='WholeCheckpointHook',
        by_epoch=by_epoch,
        interval=1 if by_epoch else 4,
        max_keep_ckpts=2,
        save_best='score',
        rule='greater',
    )
    settings = dict(
        work_dir=str(folder),
        train_dataloader=dict(loader, sampler=dict(type=sampler, shuffle=True)),
        train_cfg=loop,
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg=dict(),
        val_evaluator=[Wander()],
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2), clip_grad=dict(max_norm=1)),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, end=5, by_epoch=False), slow],
        default_hooks=dict(
            checkpoint=checkpoint,
            signals=dict(type='StopOnSignalHook'),
            finite=dict(type='FiniteLossHook'),
        ),
        custom_hooks=[dict(type='EMAHook', momentum=0.1, update_buffers=True), *hooks],
        default_scope='mmengine',
        experiment_name=f'{Path(folder).name}-{time.time_ns()}',
        randomness=dict(seed=3),
        log_level='ERROR',
        resume=resume,
    )
    # which asks for compilers for a second
    quiet = type('Quiet', (kind,), dict(_log_env=lambda self, cfg: None))
    return quiet(**{'model': Net(), **settings, **more})


def forked(function, *args, log=None, **kwargs):
    """Run ``function`` in a process of its own; gives its exit code, negative for a signal."""

    def child():
        torch.set_num_threads(1)
        if log is not None:
            target = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(target, 2)
            sys.stderr = open(2, 'w', closefd=False)  # noqa: SIM115
        launch.run(lambda _: function(*args, **kwargs))

    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    deadline = time.monotonic() + 120
    while process.exitcode is None:  # `join` would also wait for its data workers
        assert time.monotonic() < deadline, process.kill() or 'it hangs'
        time.sleep(0.005)
    return process.exitcode


def train(folder, **settings):
    make_run(folder, **settings).train()


def state(path):
    """Everything in a checkpoint that a run depends on, with the tensors as lists of bytes."""
    checkpoint = torch.load(path, weights_only=False)
    hub = checkpoint['message_hub']['runtime_info']
    kept = {k: hub[k] for k in ('best_score', 'keep_ckpt_ids') if k in hub}
    meta = {k: checkpoint['meta'][k] for k in ('epoch', 'iter', 'resuming')}
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    return plain([*(checkpoint.get(p) for p in parts), kept, meta])


def plain(node):
    if isinstance(node, torch.Tensor):
        return node.numpy().tobytes()
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return [plain(value) for value in node] if isinstance(node, list | tuple) else node


def files(folder):
    """The checkpoints of a work dir, and what names the last one."""
    return sorted(
        p.name for p in Path(folder).iterdir() if p.suffix == '.pth' or p.stem == 'last_checkpoint'
    )
