"""Time, memory and limits of this machine, measured so that ratios can be trusted.

The sides of a comparison are called in turns (A B A B ...), so that anything that slows the machine
down affects all of them. A ratio is the median of the ratios within each turn, with quartiles.
"""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvit_mm.errors import require
from fastvit_mm.models.onednn import Rearranged
from fastvit_mm.reparameterize import distance, tensors

from .apart import where_it_runs

MIN_TURNS, MAX_TURNS = 5, 500

#: Largest difference that rounding explains, relative to the largest output.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass
class Spread:
    """Median and quartiles of measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values) -> 'Spread':
        low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))


def milliseconds(seconds: list[float]) -> Spread:
    return Spread.of(1e3 * np.asarray(seconds))


def megabytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@where_it_runs
def timed(call: Callable) -> float:
    """Seconds that one call takes until the device has finished."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def interleave(calls: dict[str, Callable], seconds: float, warmup: int = 3) -> dict[str, list]:
    """Call everything in turns for about ``seconds``, after ``warmup`` turns that do not count.

    Returns:
        The seconds of the calls, by name; value i of each list is from turn i.
    """
    for _ in range(warmup):
        turn = sum(timed(call) for call in calls.values())
    turns = int(np.clip(seconds / max(turn, 1e-9), MIN_TURNS, MAX_TURNS))
    times = {name: [] for name in calls}
    gc.collect()
    gc.disable()  # a collection would slow down one side at random
    try:
        for _ in range(turns):
            for name, call in calls.items():
                times[name].append(timed(call))
    finally:
        gc.enable()
    return times


def ratio(slow: list[float], fast: list[float]) -> Spread:
    """How many times faster ``fast`` is, turn by turn."""
    return Spread.of(np.asarray(slow) / np.asarray(fast))


def fastest(times: dict[str, list], *names: str) -> str:
    """The one of ``names`` with the lowest median."""
    return min(names, key=lambda name: statistics.median(times[name]))


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def agree(outputs, reference, dtype: torch.dtype = torch.float32) -> str | None:
    """Why no ratio of the two sides may be shown, or None if their outputs are the same."""
    if not all(t.isfinite().all() for t in tensors((outputs, reference))):
        return 'no ratio: outputs are not finite'
    difference = distance(outputs, reference)
    if difference <= TOLERANCE[dtype]:
        return None
    return f'no ratio: outputs differ by {difference:.1e}'


# --- memory ---------------------------------------------------------------------------------------


def process_memory(field: str) -> int:
    """Bytes of VmRSS or VmHWM (its peak) of this process; Linux."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f'no {field} in /proc/self/status')


@where_it_runs
def peak_memory(call: Callable, device: str = 'cpu') -> int | None:
    """Bytes that ``call`` needs at its peak, beyond those in use before.

    On a GPU, PyTorch's allocations there. On the CPU, the resident memory of the process, which
    includes the allocations of all libraries: the minimum of three calls, because the first may
    also fill caches. Each call includes the rearranged weights of deployed models, which are made
    again. None if the system cannot tell (not Linux).
    """
    gc.collect()
    if device.startswith('cuda'):
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        return min(resident_growth(call) for _ in range(3))
    except (OSError, AttributeError):
        return None


def resident_growth(call: Callable) -> int:
    """Bytes by which the resident memory of this process grows during ``call``; Linux."""
    for weight in Rearranged.everywhere:
        weight.forget()
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    before = process_memory('VmRSS')
    call()
    return max(process_memory('VmHWM') - before, 0)


@where_it_runs
def page_faults(call: Callable) -> int | None:
    """Pages of memory (4 KB) that the system provided and cleared during one ``call``: the minimum
    of three, after one that does not count. None if the system cannot tell."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    faults = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults[1:])


def flops(call: Callable) -> int:
    """Floating-point operations of one call: two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# --- the machine and its limits -------------------------------------------------------------------


def cpu_name() -> str:
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: str, threads: int) -> dict[str, str]:
    """Names and versions that a reader needs to judge the figures."""
    names = ('torch', 'timm', 'onnxruntime', 'mmengine', 'onedl-mmengine', 'mmpretrain')
    versions = {}
    for name in (*names, 'onedl-mmpretrain'):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = {'GPU': torch.cuda.get_device_name()} if device.startswith('cuda') else {}
    return {
        'CPU': f'{cpu_name()}, {cores()} cores',
        **gpu,
        'threads': str(threads),
        'vector instructions': torch.backends.cpu.get_cpu_capability(),
        'Python': platform.python_version(),
        **versions,
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def rate(call: Callable, work: float, seconds: float) -> float:
    """``work`` per second in the fastest of the calls that fit into ``seconds``."""
    return work / min(interleave({'call': call}, seconds)['call'])


def limits(
    device: str, threads: int, seconds: float = 1.0, size: int = 2048, copied: int = 2**28
) -> dict[str, float]:
    """The peak rates measured on this machine.

    Returns:
        Matrix products of ``size`` in GFLOP/s: in fp32 with torch.mm and on the CPU also with
        oneDNN (as a pointwise convolution) and ONNX Runtime, in bf16, and on a GPU in fp16; memory
        copy of ``copied`` bytes in GB/s, read and written.
    """
    work = 2 * size**3 / 1e9
    side = int(size**0.5)
    found = {}
    dtypes = [torch.float32, torch.bfloat16]
    if device.startswith('cuda'):
        dtypes.append(torch.float16)
    with torch.inference_mode():
        for dtype in dtypes:
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            name = str(dtype).removeprefix('torch.')
            found[f'{name} GEMM, torch.mm, GFLOP/s'] = rate(lambda a=a, b=b: a @ b, work, seconds)
        if device == 'cpu':
            image = torch.randn(1, size, side, side).to(memory_format=torch.channels_last)
            kernel = torch.randn(size, size, 1, 1).to(memory_format=torch.channels_last)
            found['float32 GEMM, oneDNN, GFLOP/s'] = rate(
                lambda: torch.nn.functional.conv2d(image, kernel),
                2 * size * size * side**2 / 1e9,
                seconds,
            )
            if call := onnxruntime_gemm(size, threads):
                found['float32 GEMM, ONNX Runtime, GFLOP/s'] = rate(call, work, seconds)
        source, target = (torch.ones(copied, dtype=torch.uint8, device=device) for _ in range(2))
        found['memory copy, GB/s'] = rate(lambda: target.copy_(source), 2 * copied / 1e9, seconds)
    return found


def best_gflops(found: dict[str, float], dtype: torch.dtype = torch.float32) -> float | None:
    """The fastest matrix product among the ``limits`` in ``dtype``."""
    name = str(dtype).removeprefix('torch.')
    return max((v for k, v in found.items() if k.startswith(f'{name} GEMM')), default=None)


def onnxruntime_gemm(size: int, threads: int) -> Callable | None:
    try:
        from onnx import TensorProto, helper
    except ImportError:
        return None
    shape = [size, size]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in 'abc']
    graph = helper.make_graph(
        [helper.make_node('MatMul', ['a', 'b'], ['c'])], 'gemm', values[:2], values[2:]
    )
    opsets = [helper.make_opsetid('', 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = onnxruntime_session(model.SerializeToString(), threads)
    feed = {n: np.random.rand(*shape).astype(np.float32) for n in 'ab'}
    return lambda: session.run(None, feed)


def onnxruntime_session(model: bytes, threads: int, spin: bool = True, arena: bool = True):
    """An ONNX Runtime session on the CPU with as many threads as PyTorch has.

    ``spin``: its threads may spin while they wait during a run, which is the default, but never
    after it, when they would take cores from the other side. ``arena``: keep memory between runs.

    Raises:
        FastViTError: ONNX Runtime is not installed.
    """
    onnxruntime = require('ONNX Runtime', 'onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = arena
    options.add_session_config_entry('session.intra_op.allow_spinning', str(int(spin)))
    options.add_session_config_entry('session.force_spinning_stop', '1')
    return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
