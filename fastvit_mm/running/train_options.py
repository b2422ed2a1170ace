"""Options of training that change how a config is computed, not what it computes."""

import argparse
import os
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast

from fastvit_mm.errors import FastViTError, require

#: What ``--log`` names.
BACKENDS = dict(
    tensorboard='TensorboardVisBackend', wandb='WandbVisBackend', mlflow='MLflowVisBackend'
)


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Training in bfloat16 where PyTorch's autocast allows, on a GPU or the CPU. Unlike float16, it
    has the range of float32, so no loss is scaled; mmengine's AmpOptimWrapper needs a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module):
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def apply(cfg: Config, args: argparse.Namespace) -> None:
    """Change ``cfg`` as the options in ``args`` ask.

    Raises:
        FastViTError: this machine or the config does not support one of them.
    """
    if args.amp:
        mixed_precision(cfg, args.amp)
    if args.accumulate > 1:
        accumulate(cfg, args.accumulate)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise FastViTError(
                '--auto-scale-lr needs the batch size for which the learning rate is meant: '
                'set auto_scale_lr.base_batch_size in the config'
            )
        cfg.auto_scale_lr.enable = True
    if args.compile:
        if args.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise FastViTError(f'--compile {args.compile}: one of {", ".join(known)}')
        cfg.compile = dict(backend=args.compile)
    if args.seed is not None:
        cfg.merge_from_dict({'randomness.seed': args.seed})
    if args.deterministic:
        cfg.merge_from_dict({'randomness.deterministic': True, 'env_cfg.cudnn_benchmark': False})
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS refuses without it
    if args.no_validate and args.early_stop:
        raise FastViTError('--early-stop needs validations: leave out --no-validate')
    if args.no_validate:
        skip_validation(cfg)
    if args.early_stop:
        stop_early(cfg, args.early_stop)
    if wanted := [*args.log, *['tensorboard'] * args.tensorboard]:
        log_to(cfg, *(BACKENDS[name] for name in wanted))


def check_loggers(args: argparse.Namespace) -> None:
    """Raise a FastViTError if a package is not installed to which ``args`` let a run log."""
    for name in args.log:
        require(f'--log {name}', name)
    if args.tensorboard:
        require('--tensorboard', 'tensorboard')


def log_to(cfg: Config, *kinds: str) -> None:
    """Make the visualizer also write to mmengine's backends ``kinds``."""
    cfg.setdefault('visualizer', dict(type='Visualizer'))
    backends = list(cfg.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')])
    have = [one['type'] for one in backends]
    cfg.visualizer.vis_backends = backends + [dict(type=k) for k in kinds if k not in have]


def skip_validation(cfg: Config) -> None:
    """Only train: without validations no checkpoint is the best one."""
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg[key] = None
    if 'checkpoint' in cfg.get('default_hooks', {}):
        cfg.default_hooks.checkpoint.pop('save_best', None)


def stop_early(cfg: Config, patience: int) -> None:
    """End when ``patience`` validations have not improved what chooses the best checkpoint.

    Raises:
        FastViTError: the config does not say what that is, or names several.
    """
    hook = cfg.get('default_hooks', {}).get('checkpoint', {})
    monitor = hook.get('save_best')
    if isinstance(monitor, list | tuple):
        raise FastViTError(
            f'--early-stop: the config chooses best checkpoints by {len(monitor)} metrics, '
            f'{", ".join(monitor)}: set default_hooks.checkpoint.save_best to one of them'
        )
    if not isinstance(monitor, str) or monitor == 'auto':
        raise FastViTError(
            '--early-stop: the config does not say which metric counts: set '
            'default_hooks.checkpoint.save_best=METRIC'
        )
    stop = dict(type='EarlyStopHook', monitor=monitor, patience=patience, strict=True)
    stop['min_delta'] = 1e-6  # with 0, an equal value counts as an improvement
    if 'rule' in hook:
        stop['rule'] = hook.rule
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), stop]


def accumulate(cfg: Config, parts: int) -> None:
    """Let an iteration take ``parts`` times the config's batch, in as many parts."""
    hooks = cfg.get('custom_hooks') or []
    if any(hook.get('type') == 'AccumulateHook' for hook in hooks):
        raise FastViTError(
            f'--accumulate {parts}: the config has an AccumulateHook already, as one that such a '
            'run has saved: leave the option out, or start from the original config'
        )
    if (count := cfg.optim_wrapper.get('accumulative_counts', 1)) > 1:
        raise FastViTError(
            f'--accumulate {parts}: the config accumulates as well '
            f'(optim_wrapper.accumulative_counts={count}): use one of them'
        )
    cfg.train_dataloader.batch_size *= parts
    cfg.custom_hooks = [*hooks, dict(type='AccumulateHook', parts=parts)]


def mixed_precision(cfg: Config, kind: str) -> None:
    """Let the optimizer's wrapper train in ``kind``: auto, fp16 or bf16."""
    gpu = get_device() == 'cuda'
    if kind == 'fp16' and not gpu:
        raise FastViTError('--amp fp16 needs a GPU, but none was found: use --amp bf16')
    if kind == 'bf16' and gpu and not torch.cuda.is_bf16_supported():
        raise FastViTError('--amp bf16: this GPU does not support it, use --amp fp16')
    wrapper = cfg.optim_wrapper
    if kind == 'bf16' or not gpu:
        wrapper.type = 'BFloat16OptimWrapper'
        for key in ('dtype', 'loss_scale'):
            wrapper.pop(key, None)
    else:
        wrapper.type, wrapper.dtype = 'AmpOptimWrapper', 'float16'
        wrapper.setdefault('loss_scale', 'dynamic')


def compile_network(model: nn.Module, settings: bool | dict | None) -> None:
    """Let the backbone and the neck of ``model`` run compiled in training.

    mmengine compiles the whole training step, optimizer included, which PyTorch 2.14 cannot. What
    is compiled here keeps its parameters' names, and copies of it (averages, the deploy form) are
    not compiled.

    Args:
        settings: a config's ``compile``: arguments of ``torch.compile``, or whether to compile.
    """
    if not settings:
        return
    for name in ('backbone', 'neck'):
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            part.compile(**({} if settings is True else settings))
            part._compiled_call_impl = only_in_training(part)


def only_in_training(module: nn.Module) -> Callable:
    """Tests have images of many sizes, for each of which a compiler would begin again."""
    compiled = module._compiled_call_impl

    def call(*args, **kwargs):
        return (compiled if module.training else module._call_impl)(*args, **kwargs)

    return call
