"""Options of training that change how a config is computed, not what it computes."""

import argparse
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast

from fastvit_mm.errors import FastViTError


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Training in bfloat16 where PyTorch's autocast allows, on a GPU or the CPU. Unlike float16, it
    has the range of float32, so no loss is scaled; mmengine's AmpOptimWrapper needs a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module):
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--amp',
        nargs='?',
        const='auto',
        choices=['auto', 'fp16', 'bf16'],
        help='train in mixed precision: fp16 (the default on a GPU) or bf16 (on a CPU)',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the batch size of all processes over the recipe's",
    )
    parser.add_argument(
        '--accumulate',
        type=positive,
        default=1,
        metavar='N',
        help="batches of N times the config's size, computed in N parts with the memory of one; "
        'an iteration (max_iters, schedules) is one such batch. Equals the large batch up to '
        'rounding, except that BatchNorm normalizes each part by itself and that Mixup and CutMix '
        'are drawn for each part',
    )
    parser.add_argument(
        '--compile',
        nargs='?',
        const='inductor',
        metavar='BACKEND',
        help='train with backbone and neck compiled by torch.compile (inductor)',
    )


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


def log_to_tensorboard(cfg: Config) -> None:
    """Make the visualizer also write TensorBoard's event files."""
    cfg.setdefault('visualizer', dict(type='Visualizer'))
    backends = cfg.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')]
    if all(one['type'] != 'TensorboardVisBackend' for one in backends):
        cfg.visualizer.vis_backends = [*backends, dict(type='TensorboardVisBackend')]


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
