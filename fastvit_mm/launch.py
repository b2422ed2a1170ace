"""Code shared by the tools: reading a config, and running with clear errors."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner as BaseRunner

from . import data, weights
from .data import check_data
from .demo import apply_demo
from .errors import FastViTError, one_line, root_cause
from .export import attach, is_exported
from .reparameterize import network, unwrap


def config_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of every tool that takes a config, for :func:`load_config`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--demo', action='store_true', help='shrink the config to the demo data')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='settings to change: key=value ...'
    )
    parser.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return parser


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The same plus the arguments of the tools that start a run."""
    parser = config_parser(description)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='job launcher'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """The config that the arguments ask for.

    Raises:
        FastViTError: the file does not exist or cannot be read.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher != 'none' and not torch.cuda.is_available():
        raise FastViTError(
            f'--launcher {args.launcher} needs GPUs, but none was found: leave it out'
        )
    path = Path(args.config)
    if not path.is_file():
        raise FastViTError(f'config {path} does not exist: the configs are under configs/<task>/')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise FastViTError(f'config {path} cannot be read: {one_line(error)}') from error
    if cfg.get('default_scope') == 'mmpretrain':
        from . import transforms  # noqa: F401  (a config's own custom_imports replace ours)
    elif cfg.get('default_scope') == 'mmdet':
        from .data import coco  # noqa: F401
    if args.demo:
        apply_demo(cfg)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    folder = Path('work_dirs', 'demo' if args.demo else '', path.stem)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(folder)
    return cfg


class Runner(BaseRunner):
    """mmengine's runner, with data checked, and checkpoints read safely and loaded strictly."""

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs):
        return data.build_checked(dataloader, *args, **kwargs)

    def dump_config(self):
        # A test's reduced config must not replace the one that training saved in the work dir.
        if self._train_dataloader is not None:
            super().dump_config()

    def load_checkpoint(self, filename, map_location='cpu', strict=False, revise_keys=None):
        model = network(self.model)
        tests_only = self._train_dataloader is None
        checkpoint = weights.prepare(model, filename, whole=self._resume or tests_only)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model.load_state_dict(checkpoint['state_dict'], strict=False)
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint


TRAIN_ONLY = (
    *('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr'),
    *('val_dataloader', 'val_cfg', 'val_evaluator'),
)


def test_runner(cfg: Config, checkpoint: str) -> Runner:
    """A runner that can only test: without training set, optimizer, averaging or downloads.

    Args:
        checkpoint: weights in any layout, or an exported file, which then replaces the model.
    """
    check_data(cfg, 'test')
    for key in TRAIN_ONLY:
        cfg.pop(key, None)
    exported = is_exported(checkpoint)
    idle = ('EMAHook', 'ReparameterizeHook') if exported else ('EMAHook',)
    cfg.custom_hooks = [h for h in cfg.get('custom_hooks', []) if h['type'] not in idle]
    cfg.load_from, cfg.resume = None if exported else str(weights.find(checkpoint)), False
    weights.drop_pretrained(cfg.model)
    if 'teacher' in cfg.model:
        cfg.model.teacher = None
    runner = Runner.from_cfg(cfg)
    if exported:
        runner.model = attach(unwrap(runner.model), checkpoint)
    return runner


def run(main: Callable[[list[str] | None], None]) -> None:
    """Call ``main``; print an error that is meant for users as one line and exit with code 2."""
    try:
        main(None)
    except FastViTError as error:
        sys.stdout.flush()
        print(f'error: {" ".join(str(root_cause(error)).split())}', file=sys.stderr)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.exit(2)
