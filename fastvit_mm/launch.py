"""Code shared by the tools: reading a config, checking its data, and running with clear errors."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as BaseRunner

from . import weights, work_dir
from .batches import death_of_worker
from .demo import apply_demo
from .errors import FastViTError, one_line
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
    if args.demo:
        apply_demo(cfg)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    folder = Path('work_dirs', 'demo' if args.demo else '', path.stem)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(folder)
    return cfg


def datasets_in(node) -> Iterator[ConfigDict]:
    """Every data set in a dataloader's config, including those in wrappers (RepeatDataset)."""
    if isinstance(node, list | tuple):
        for child in node:
            yield from datasets_in(child)
    elif isinstance(node, dict):
        if 'data_root' in node:
            yield node
        for key in ('dataset', 'datasets'):
            yield from datasets_in(node.get(key))


def expected_paths(dataset: dict) -> list[str]:
    """Files and folders under its root that a data set's config names."""
    prefix = dataset.get('data_prefix') or dataset.get('split') or ''
    parts = list(prefix.values()) if isinstance(prefix, dict) else [prefix]
    return [p for p in [*parts, dataset.get('ann_file')] if p]


def check_data(cfg: Config, *stages: str) -> None:
    """Fail early, with a helpful message, if a data set is missing.

    Args:
        stages: any of train, val, test.
    """
    found = [d for s in stages for d in datasets_in(cfg.get(f'{s}_dataloader'))]
    for dataset in found:
        root = Path(dataset['data_root'])
        paths = [root, *(root / p for p in expected_paths(dataset))]
        if missing := [p for p in paths if not p.exists()]:
            same_root = [d for d in found if d['data_root'] == dataset['data_root']]
            layout = dict.fromkeys(p for d in same_root for p in expected_paths(d))
            raise FastViTError(
                f'data set not found: {missing[0]} is missing; {dataset["type"]} expects '
                f'{", ".join(layout)} under {root.resolve()}; see docs/data.md, '
                'or add --demo to run on generated data'
            )


class Runner(BaseRunner):
    """mmengine's runner, with checkpoints read safely and loaded strictly."""

    def train(self):
        try:
            with work_dir.says_if_not_writable(self.work_dir):
                return super().train()
        except RuntimeError as error:
            loops = [o for o in (self._train_loop, self._val_loop) if isinstance(o, BaseLoop)]
            if death := death_of_worker(error, [loop.dataloader for loop in loops]):
                raise death from error
            raise
        finally:
            self.call_hook('restore')

    def load_or_resume(self):
        if self._resume and self._load_from is None:
            self._load_from = work_dir.latest(self.work_dir)
            if not self._load_from:
                self.logger.info(f'no checkpoint in {self.work_dir} yet: starting a new run')
            self._resume = self._load_from is not None
        super().load_or_resume()

    def resume(self, filename, *args, **kwargs):
        try:
            super().resume(str(filename), *args, **kwargs)
        except FastViTError:
            raise
        except Exception as error:  # whatever is in the file
            raise FastViTError(
                f'{filename} cannot be resumed: its optimizer, schedule or state does not fit this '
                f'config ({one_line(error)}): start from its weights with '
                f'--cfg-options load_from={filename}'
            ) from error

    def dump_config(self):
        # A test's reduced config must not replace the one that training saved in the work dir.
        if self._train_dataloader is not None:
            super().dump_config()

    def load_checkpoint(self, filename, map_location='cpu', strict=False, revise_keys=None):
        model = network(self.model)
        tests_only = self._train_dataloader is None
        checkpoint = weights.prepare(model, filename, whole=self._resume or tests_only)
        if self._resume:
            work_dir.check_resumable(checkpoint, filename)
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
    except KeyboardInterrupt:
        sys.exit(130)
    except FastViTError as error:
        # A registry that was building an object raises the error again with its own prefix.
        while isinstance(error.__context__, FastViTError):
            error = error.__context__
        sys.stdout.flush()
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.exit(2)
