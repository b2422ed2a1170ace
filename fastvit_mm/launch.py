"""Code shared by the tools: reading a config, and running with clear errors."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner as BaseRunner

from . import configs, data, failures, noise, settings, weights
from .data import check_data
from .demo import apply_demo
from .errors import FastViTError, one_line, require
from .evaluation.mirrored import augment_test
from .export import attach, is_exported
from .hooks import AfterFailureHook, ScreenHook, screen
from .reparameterize import network, unwrap
from .running import processes, work_dir
from .running.batches import says_if_worker_dies
from .running.device import use
from .running.train_options import compile_network
from .running.watch import one_fate
from .settings.widths import type_of


def load_config(args: argparse.Namespace, training: bool = False, more: Iterable = ()) -> Config:
    """The config that the arguments ask for.

    Args:
        training: whether it will be trained, so that its training part must be in order.
        more: further sections that must be in order.

    Raises:
        FastViTError: the file does not exist or cannot be read, or a setting is wrong.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = configs.find(args.config)
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise FastViTError(f'config {path} cannot be read: {one_line(error)}') from error
    if cfg.get('default_scope') == 'mmpretrain':
        from . import transforms  # noqa: F401  (a config's own custom_imports replace ours)
    elif cfg.get('default_scope') == 'mmdet':
        from .data import coco  # noqa: F401
    if args.demo:
        settings.check(cfg)
        apply_demo(cfg)
    changes = settings.merge(cfg, args.cfg_options or {})
    settings.check(cfg, changes, settings.TRAIN if training else settings.PREDICT | set(more))
    settings.check_widths(cfg.model)
    processes.check(cfg, args.launcher)
    processes.join(args.launcher, (cfg.get('env_cfg') or {}).get('dist_cfg', {}))
    cfg.launcher = args.launcher
    folder = Path('work_dirs', 'demo' if args.demo else '', path.stem)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(folder)
    return cfg


class Runner(BaseRunner):
    """mmengine's runner, with data checked, checkpoints read safely and loaded strictly, several
    processes on CPUs, too, and tests that leave nothing behind when they fail."""

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs):
        return data.build_checked(dataloader, *args, **kwargs)

    def register_hooks(self, default_hooks=None, custom_hooks=None):
        ours = [AfterFailureHook(), ScreenHook()]
        super().register_hooks(default_hooks, [*(custom_hooks or []), *ours])

    def build_evaluator(self, evaluator):
        metrics = evaluator if isinstance(evaluator, list | tuple) else [evaluator]
        if any(type_of(one) == 'FasterCocoMetric' for one in metrics):
            require('FasterCocoMetric', 'faster_coco_eval')
        return super().build_evaluator(evaluator)

    def build_logger(self, *args, **kwargs):
        logger = super().build_logger(*args, **kwargs)
        screen.take_over(logger, introduce=True)
        return logger

    def setup_env(self, env_cfg):
        processes.join(self.launcher, env_cfg.get('dist_cfg', {}))
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg, model):
        if self.distributed and not is_model_wrapper(model):
            model_wrapper_cfg = processes.wrapper(self.cfg)
        return super().wrap_model(model_wrapper_cfg, model)

    def _maybe_compile(self, target):
        compile_network(network(self.model), self.cfg.get('compile'))

    def train(self):
        try:
            with work_dir.says_if_not_writable(self.work_dir), says_if_worker_dies(self):
                return super().train()
        finally:
            self.call_hook('restore')

    def val(self):
        with says_if_worker_dies(self):
            return super().val()

    def test(self):
        with says_if_worker_dies(self):
            return super().test()

    def resume_latest(self):
        """Resume the run in the work dir; if there is none yet, ``load_from`` stays as it is."""
        if found := work_dir.latest(self.work_dir):
            self._load_from, self._resume = found, True
        else:
            self.logger.info(f'no checkpoint in {self.work_dir} yet: starting a new run')

    def load_or_resume(self):
        if self._resume and self._load_from is None and not self._has_loaded:
            self._resume = False
            self.resume_latest()
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
        whole = self._resume or tests_only
        checkpoint = weights.prepare(model, filename, whole, switch=tests_only)
        if self._resume:
            work_dir.check_resumable(checkpoint, filename)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model.load_state_dict(checkpoint['state_dict'], strict=False)
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint


def test_runner(
    cfg: Config, checkpoint: str, device: str | None = None, tta: bool = False
) -> Runner:
    """A runner that can only test: without training set, optimizer, averaging or downloads.

    Args:
        checkpoint: weights in any layout, or an exported file, which then replaces the model.
        device: None: a GPU if there is one.
        tta: whether to average predictions, see :func:`augment_test`.
    """
    if device and cfg.get('launcher', 'none') != 'none':
        raise FastViTError('--device: several processes choose their own, leave it out')
    place = use(device) if device else None
    if 'teacher' in cfg.model:
        cfg.model.teacher = None
    if tta:
        augment_test(cfg)
    settings.check(cfg, reads=settings.TEST)
    check_data(cfg, 'test')
    for key in settings.TRAIN - settings.TEST:
        cfg.pop(key, None)
    exported = is_exported(checkpoint)
    idle = ('EMAHook', 'ReparameterizeHook') if exported else ('EMAHook',)
    cfg.custom_hooks = [h for h in cfg.get('custom_hooks', []) if type_of(h) not in idle]
    cfg.load_from, cfg.resume = None if exported else str(weights.find(checkpoint)), False
    weights.drop_pretrained(cfg.model)
    runner = Runner.from_cfg(cfg)
    if place:
        runner.model.to(place)
    if exported:
        runner.model = unwrap(runner.model)
        attach(network(runner.model), checkpoint, averaged=tta)
    return runner


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Call ``main``; print an error as one line and exit.

    The exit code is 2 for what the user can mend, otherwise 1; the traceback is then in a file.
    With ``--debug`` in ``argv`` (the command line) it is shown instead.
    """
    debug = '--debug' in (sys.argv[1:] if argv is None else argv)
    if debug:
        noise.show_everything()
    try:
        with one_fate(), screen.closing():
            main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.stdout.flush()
        if debug:
            traceback.print_exception(error)
        text, code = failures.explain(error, debug)
        print(f'error: {text}', file=sys.stderr)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        sys.exit(code)
