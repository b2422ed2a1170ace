"""The sides of a comparison: our FastViT and timm's with the same weights, and how they run."""

import copy
import itertools
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import fastvit_mm
from fastvit_mm import FastViT, FastViTError

from . import measure

CLASSIFIER = 'configs/classification/fastvit_{}_in1k.py'
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels last': torch.channels_last}
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}


@torch.no_grad()
def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set random weights, statistics and scales with which every part affects the outputs.

    With newly initialized ones, a wrong merge would give almost the same outputs.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))

    for name, parameter in model.named_parameters():
        if name.endswith('gamma'):
            uniform(parameter, -0.2, 0.2)
        elif parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
        else:
            uniform(parameter, -0.3, 0.3)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for scale in (module.weight, module.running_var):
                uniform(scale, 0.5, 1.5)
            uniform(module.running_mean, -0.3, 0.3)
    return model


def backbones(arch: str, **args) -> tuple[nn.Module, nn.Module]:
    """Our and timm's backbone up to the last stage, with the same weights, in training form.

    ``args`` are passed to ours.
    """
    torch.manual_seed(0)
    ours = unsettle(FastViT(arch, out_indices=(3,), **args))
    theirs = timm.create_model(f'fastvit_{arch}')
    # The parts of timm's classifier after the stages are neither loaded nor run.
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, nn.Sequential(theirs.stem, theirs.stages)


def deployed(arch: str) -> dict[str, nn.Module]:
    """Both in their deploy form, in eval mode."""
    ours, theirs = backbones(arch)
    return dict(
        ours=fastvit_mm.reparameterize(ours), timm=reparameterize_model(theirs.eval()).eval()
    )


def classifiers(arch: str) -> tuple[nn.Module, nn.Module]:
    """Our config's classifier and timm's, the same weights, in training form and eval mode."""
    torch.manual_seed(0)
    ours = unsettle(fastvit_mm.init_model(CLASSIFIER.format(arch)))
    theirs = timm.create_model(f'fastvit_{arch}')
    prefixes = re.compile(r'^(backbone|neck)\.')
    theirs.load_state_dict({prefixes.sub('', k): v for k, v in ours.state_dict().items()})
    return ours, theirs.eval()


def shapes(sizes: list[int], batches: list[int]) -> list[tuple[int, int]]:
    """Pairs of size and batch; a single size or batch is combined with all of the other."""
    if 1 in (len(sizes), len(batches)):
        return list(itertools.product(sizes, batches))
    if len(sizes) != len(batches):
        raise FastViTError(
            f'--sizes and --batch are paired: give the same number of both, or one of either; '
            f'got {len(sizes)} and {len(batches)}'
        )
    return list(zip(sizes, batches, strict=True))


def images(size: int | tuple[int, int], batch: int, seed: int = 0) -> Tensor:
    """(batch, 3, H, W), distributed like normalized images."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def eager(model: nn.Module, inputs: Tensor) -> Callable:
    return lambda: model(inputs)


def compiled(model: nn.Module, inputs: Tensor) -> Callable:
    """Compiled by inductor; on the CPU with its freezing, which treats weights as constants."""
    fast = torch.compile(model, options={'freezing': True} if inputs.device.type == 'cpu' else None)
    return lambda: fast(inputs)


def cuda_graph(model: nn.Module, inputs: Tensor) -> Callable:
    """Replays the captured kernels; every call overwrites the outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = model(inputs)

    def replay():
        graph.replay()
        return outputs

    return replay


def to_onnx(model: nn.Module, inputs: Tensor) -> bytes:
    """``model`` for inputs of exactly this shape."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        path = Path(folder, 'model.onnx')
        torch.onnx.export(model, (inputs,), path, dynamo=True, external_data=False, verbose=False)
        return path.read_bytes()


def runtime_call(content: bytes, inputs: Tensor, threads: int, **options) -> Callable:
    """A call of an exported model in ONNX Runtime that returns its outputs as tensors."""
    session = measure.onnxruntime_session(content, threads, **options)
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: [torch.from_numpy(o) for o in session.run(None, feed)]


def onnxruntime(model: nn.Module, inputs: Tensor) -> Callable:
    inputs = inputs.contiguous()
    return runtime_call(to_onnx(model, inputs), inputs, torch.get_num_threads())


#: How ours and timm's are run.
MODES = {
    'eager': (eager, eager),
    'compile': (compiled, compiled),
    'eager:compile': (eager, compiled),
    'eager:onnx': (eager, onnxruntime),
    'graph': (cuda_graph, cuda_graph),
}


def calls(
    model: nn.Module,
    inputs: Tensor,
    device: str = 'cpu',
    dtype: str = 'fp32',
    run: Callable = eager,
) -> dict[str, Callable]:
    """A call for each memory layout of weights and images."""
    made = {}
    for name, layout in LAYOUTS.items():
        placed = copy.deepcopy(model).to(device, DTYPES[dtype]).to(memory_format=layout)
        made[name] = run(placed, inputs.to(device, DTYPES[dtype]).contiguous(memory_format=layout))
    return made


@dataclass
class Outcome:
    """The comparison of two sides, each in its faster layout.

    Attributes:
        row: columns of a report: times of all calls, the ratio or why there is none, memory.
        ratio: how many times faster the first side is, or why no ratio may be shown.
        contiguous: the same with both in PyTorch's default layout.
        seconds: median time of the first side.
    """

    row: dict
    ratio: measure.Spread | str
    contiguous: measure.Spread | str
    seconds: float


def contest(
    sides: dict[str, dict[str, Callable]],
    seconds: float,
    device: str,
    dtype: str = 'fp32',
    memory: dict[str, dict[str, Callable]] | None = None,
    outputs: Callable | None = None,
) -> Outcome:
    """Compare the first side with the second.

    Args:
        sides: calls that return the outputs, by name of the side, then of the layout.
        dtype: the less exact one of the two.
        memory: calls whose memory is measured, if not those of ``sides``.
        outputs: returns the outputs that must agree, the reference last, if not those of the calls.
    """
    calls = {f'{side}, {layout}': c for side, own in sides.items() for layout, c in own.items()}
    first, second = sides
    *others, reference = outputs() if outputs else [call() for call in calls.values()]
    refusals = [measure.agree(other, reference, DTYPES[dtype]) for other in others]
    times = measure.interleave(calls, seconds)
    best = {s: measure.fastest(times, *(f'{s}, {layout}' for layout in sides[s])) for s in sides}
    refusal = next(filter(None, refusals), None)

    def ratio_of(fast: str, slow: str) -> measure.Spread | str:
        return refusal or measure.ratio(times[slow], times[fast])

    ratio = contiguous = ratio_of(best[first], best[second])
    row = {f'{name}, ms': measure.milliseconds(own) for name, own in times.items()}
    if len(times) > len(sides):
        row['faster layouts'] = ' / '.join(best[s].removeprefix(f'{s}, ') for s in sides)
        contiguous = ratio_of(*(f'{side}, {next(iter(own))}' for side, own in sides.items()))
        row['ratio, contiguous'] = contiguous
    row['ratio'] = ratio
    row['turns'] = len(times[best[first]])
    for side, own in (memory or sides).items():
        call = own[best[side].removeprefix(f'{side}, ')]
        if device == 'cpu':
            row[f'{side}, page faults'] = measure.page_faults(call)
        row[f'{side}, peak MB'] = measure.megabytes(measure.peak_memory(call, device))
    return Outcome(row, ratio, contiguous, median(times[best[first]]))
