"""Several processes: MMEngine's launchers on GPUs and, with gloo, on CPUs.

mmengine 0.10 selects a GPU in every process, whatever the backend, and gives a GPU's number to
DistributedDataParallel. So a runner joins its process group here, which mmengine then finds
initialized, and wraps its model with the device that there is.
"""

import os
import subprocess
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS

from fastvit_mm.errors import FastViTError, one_line

from . import watch
from .sync_batch_norm import run_on_cpu

#: By launcher: what starts the processes, and where it says which one this is.
LAUNCHERS = {
    'pytorch': (
        'torchrun --nproc-per-node N tools/... --launcher pytorch',
        ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'),
    ),
    'slurm': (
        'srun python tools/... --launcher slurm',
        ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_JOB_ID'),
    ),
}
SHARDED = ('FullyShardedDataParallel', 'DeepSpeed', 'ColossalAI')


def check(cfg: Config, launcher: str) -> None:
    """Whether ``cfg`` can run under ``launcher``: none, pytorch or slurm.

    Raises:
        FastViTError: the launcher has not started this process, or the config asks for a runner
            or a strategy other than data parallelism.
    """
    if launcher in LAUNCHERS:
        command, names = LAUNCHERS[launcher]
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise FastViTError(
                f'--launcher {launcher}: {", ".join(missing)} not set in the environment: '
                f'start with {command}'
            )
    runner = cfg.get('runner_type', 'Runner')
    parts = [cfg.get(k) for k in ('strategy', 'model_wrapper_cfg', 'optim_wrapper')]
    named = [str(part.get('type', '')) if isinstance(part, dict) else '' for part in parts]
    sharded = next((n for n in named if any(kind in n for kind in SHARDED)), None)
    if runner != 'Runner' or cfg.get('strategy') or sharded:
        raise FastViTError(
            f'{sharded or named[0] or runner} is not supported: the models here fit on one GPU; '
            'leave out runner_type, strategy and sharding wrappers, and use --launcher, '
            'which trains with DistributedDataParallel'
        )


def join(launcher: str, dist_cfg: dict) -> None:
    """Join the run's process group and select this process's GPU, if there are GPUs.

    Args:
        launcher: none, pytorch or slurm.
        dist_cfg: a config's ``env_cfg.dist_cfg``: ``backend`` (without GPUs, gloo stands in for
            nccl), ``timeout`` (s), ``port`` (slurm), and arguments of ``init_process_group``.

    Raises:
        FastViTError: there is no GPU for this process, or the group cannot be joined.
    """
    if launcher not in LAUNCHERS or dist.is_initialized() or get_device() not in ('cpu', 'cuda'):
        return
    settings = dict(dist_cfg)
    port, timeout = settings.pop('port', None), settings.pop('timeout', None)
    settings.pop('init_backend', None)
    backend = settings.pop('backend', 'nccl')
    if launcher == 'slurm':
        describe_slurm(port)
    if get_device() == 'cuda':
        select_gpu(launcher)
    elif backend == 'nccl':
        backend = 'gloo'
    if timeout is not None:
        settings['timeout'] = timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, **settings)
    except (RuntimeError, ValueError) as error:
        place = ':'.join(os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT'))
        raise FastViTError(
            f'rank {os.environ["RANK"]} cannot join the others at {place}: {one_line(error)}'
        ) from error
    watch.start(timeout or 600)


def describe_slurm(port: int | None = None) -> None:
    """Set the variables of PyTorch's launcher from Slurm's.

    The rendezvous is on the job's first node, at a port of the job's own; MASTER_ADDR and
    MASTER_PORT take precedence.
    """
    own = os.environ
    own['RANK'], own['WORLD_SIZE'] = own['SLURM_PROCID'], own['SLURM_NTASKS']
    own['LOCAL_RANK'] = own['SLURM_LOCALID']
    if port is not None:
        own['MASTER_PORT'] = str(port)
    own.setdefault('MASTER_PORT', str(20000 + int(own['SLURM_JOB_ID']) % 10000))
    if 'MASTER_ADDR' not in own:
        command = ['scontrol', 'show', 'hostnames', own.get('SLURM_JOB_NODELIST', '')]
        try:
            nodes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            own['MASTER_ADDR'] = nodes.split()[0]
        except (OSError, IndexError, subprocess.CalledProcessError) as error:
            raise FastViTError(
                f"Slurm's scontrol does not name the job's nodes ({one_line(error)}): "
                'set MASTER_ADDR to the host of task 0'
            ) from error


def select_gpu(launcher: str) -> None:
    """Make the GPU of this process the current one."""
    number, found = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if launcher == 'slurm' and found == 1:  # --gpus-per-task: each task sees only its own
        number = 0
    if number >= found:
        raise FastViTError(
            f'process {number} of this machine has no GPU: there are {found}; start as many '
            'processes (or set CUDA_VISIBLE_DEVICES= to train on CPUs)'
        )
    torch.cuda.set_device(number)
    os.environ['LOCAL_RANK'] = str(number)  # mmengine gives it to DistributedDataParallel


@MODEL_WRAPPERS.register_module()
class CPUDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper on CPUs, where there are no device numbers and SyncBatchNorm is ours."""

    def __init__(self, module: nn.Module, device_ids: list[int] | None = None, **kwargs):
        super().__init__(run_on_cpu(module), **kwargs)


def wrapper(cfg: Config) -> dict | None:
    """What mmengine wraps the models of ``cfg`` with on this device; None for its default."""
    given = cfg.get('model_wrapper_cfg')
    if get_device() != 'cpu' or (given or {}).get('type') not in (
        None,
        'MMDistributedDataParallel',
    ):
        return given
    unused = cfg.get('find_unused_parameters', False)
    usual = dict(broadcast_buffers=False, find_unused_parameters=unused)
    return {**(usual if given is None else given), 'type': 'CPUDataParallel'}
