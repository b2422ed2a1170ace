"""What a model costs, part by part: parameters, multiply-adds, memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import finalize

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .errors import FastViTError
from .models import FastViT
from .reparameterize import deploy_form

#: Regions and masks that the heads of a two-stage detector are counted for, at most, in a test.
REGIONS, MASKS = 1000, 100
#: The same in training, as mmdet's configs sample them.
SAMPLED = 512, 128


@dataclass
class Part:
    """A part of a model.

    Attributes:
        contents: such as ``6 RepMixerBlock``.
        layers: modules with weights of two dimensions or more.
        multiply_adds: of all calls, for one image.
        output: (C, H, W) of the first tensor that it gives.
    """

    name: str
    contents: str
    layers: int
    parameters: int
    multiply_adds: float = 0.0
    output: tuple[int, ...] = ()


@dataclass
class Costs:
    """What a model costs for one image.

    Attributes:
        weights: bytes of parameters and buffers.
        activations: bytes of all tensors that exist at one time in a test, at most, without the
            weights.
        kept: bytes that a training step keeps for its backward pass; None in the deploy form.
    """

    parts: list[Part]
    weights: int
    activations: int
    kept: int | None = None

    @property
    def layers(self) -> int:
        return sum(part.layers for part in self.parts)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def multiply_adds(self) -> float:
        return sum(part.multiply_adds for part in self.parts)


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that operators inside have returned and that still exist; ``peak``: of
    most at a time."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def free(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.now -= size


def saved_memory(forward: Callable, parameters: Iterable[Tensor]) -> int:
    """Bytes of the activations that ``forward`` keeps for its backward pass, without parameters."""
    own = {p.untyped_storage()._cdata for p in parameters}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # kept alive, so that no address is reused
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    size = sum(s.nbytes() for s in storages.values())
    del output
    return size


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model that have parameters: a FastViT by its stages, the rest as it is."""
    found = {}
    for name, child in model.named_children():
        if isinstance(child, FastViT):
            found['stem'] = child.stem
            found |= {f'stage {i}': stage for i, stage in enumerate(child.stages, 1)}
            norms = [m for n, m in child.named_children() if n.startswith('norm')]
            found['output norms'] = nn.ModuleList(norms)
        elif name in ('roi_head',):
            found |= parts_of(child)
        else:
            found[name.replace('_', ' ')] = child
    return {name: part for name, part in found.items() if any(True for _ in part.parameters())}


def describe(name: str, part: nn.Module) -> Part:
    blocks = Counter(type(block).__name__ for block in getattr(part, 'blocks', ()))
    contents = ', '.join(f'{number} {kind}' for kind, number in blocks.items())
    weights = (p for m in part.modules() for p in m.parameters(recurse=False))
    layers = sum(p.dim() > 1 for p in weights)
    return Part(
        name, contents or type(part).__name__, layers, sum(p.numel() for p in part.parameters())
    )


def forward(model: nn.Module, inputs: Tensor, regions: int = REGIONS, masks: int = MASKS):
    """What a model computes for ``inputs`` (B, 3, H, W), without what comes before and after its
    layers. The heads of a two-stage detector get ``regions`` and ``masks`` for each image.

    Raises:
        FastViTError: its heads need something else, as in DETR and Cascade R-CNN.
    """
    try:
        return through_layers(model, inputs, regions, masks)
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise FastViTError(
            f'the layers of {type(model).__name__} with these heads cannot be counted: only those '
            'of classifiers, segmentors, and detectors of one or two stages with plain heads can'
        ) from error


def through_layers(model: nn.Module, inputs: Tensor, regions: int, masks: int):
    if decode := getattr(model, 'decode_head', None):
        feats = model.extract_feat(inputs)  # mmseg calls its `forward`, without hooks
        auxiliary = getattr(model, 'auxiliary_head', None) if model.training else None
        more = auxiliary if isinstance(auxiliary, nn.ModuleList) else filter(None, [auxiliary])
        return [head(feats) for head in (decode, *more)]
    heads = [getattr(model, name, None) for name in ('rpn_head', 'roi_head', 'bbox_head')]
    if not any(heads):
        return model(inputs, mode='tensor') if hasattr(model, 'extract_feat') else model(inputs)
    rpn, roi, dense = heads
    feats = model.extract_feat(inputs)
    outputs = [head(feats) for head in (rpn, dense) if head]
    if roi is None:
        return outputs
    for kind, number in (('bbox', regions), ('mask', masks)):
        if (head := getattr(roi, f'{kind}_head', None)) is not None:
            size = getattr(roi, f'{kind}_roi_extractor').roi_layers[0].output_size
            outputs.append(head(feats[0].new_empty(number * len(inputs), feats[0].shape[1], *size)))
    return outputs


@contextmanager
def counted(parts: dict[str, tuple[nn.Module, Part]]) -> Iterator[None]:
    """Fill in what each part computes within."""
    handles = []
    with FlopCounterMode(display=False) as counter:
        for module, part in parts.values():

            def before(_module, _args, part=part):
                part.multiply_adds -= counter.get_total_flops() / 2

            def after(_module, _args, output, part=part):
                part.multiply_adds += counter.get_total_flops() / 2
                tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                part.output = tuple(tensors[0].shape[1:]) if tensors else ()

            handles += [module.register_forward_pre_hook(before)]
            handles += [module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def costs(model: nn.Module, size: tuple[int, int], training: bool = True) -> Costs:
    """Count what ``model`` costs for one image; nothing is computed, and ``model`` ends on the
    meta device, where tensors have no values.

    Multiply-adds are PyTorch's count: those of convolutions and matrix products.

    Args:
        model: of mmpretrain, mmdet, mmseg or ours, in either form.
        size: height and width.
        training: whether it is in the training form.
    """
    model = model.to('meta').eval()
    known = {name: (part, describe(name, part)) for name, part in parts_of(model).items()}
    image = torch.empty(1, 3, *size, device='meta')
    with torch.no_grad():
        with counted(known):
            forward(model, image)
        with LiveMemory() as memory:
            forward(model, image)
    kept = None
    if training:
        images = torch.empty(2, 3, *size, device='meta')  # BatchNorm refuses one value a channel
        model.train()
        kept = saved_memory(lambda: forward(model, images, *SAMPLED), model.parameters()) // 2
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return Costs([part for _, part in known.values()], weights, memory.peak, kept)


@dataclass
class Comparison:
    """A model in both forms; as text it is a table and what is in none of its columns."""

    name: str
    size: tuple[int, int]
    training: Costs
    deploy: Costs

    def __str__(self) -> str:
        height, width = self.size
        head = ('part', 'contents', 'output', 'layers', 'parameters', 'M multiply-adds')
        rows = [self.row(a, b) for a, b in zip(self.training.parts, self.deploy.parts, strict=True)]
        rows.append(self.row(self.training, self.deploy))
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = (
            '  '.join(
                text.ljust(wide) if i < 2 else text.rjust(wide)
                for i, (text, wide) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        )
        a, b = self.training, self.deploy
        numbers = (a.weights, b.weights, a.activations, b.activations, a.kept)
        weights, merged, live, merged_live, kept = (f'{n / 1e6:,.1f}' for n in numbers)
        return '\n'.join(
            [
                f'{self.name}, an image of {height} x {width}, training form -> deploy form\n',
                *lines,
                '',
                f'weights: {weights} -> {merged} MB',
                f'besides the weights, a test needs {live} -> {merged_live} MB per image',
                f'training keeps {kept} MB per image for the backward pass, less on a CPU',
            ]
        )

    @staticmethod
    def row(training: Part | Costs, deploy: Part | Costs) -> tuple[str, ...]:
        return (
            getattr(training, 'name', 'all'),
            getattr(training, 'contents', ''),
            ' x '.join(map(str, getattr(training, 'output', ()))),
            f'{training.layers} -> {deploy.layers}',
            f'{training.parameters:,} -> {deploy.parameters:,}',
            f'{training.multiply_adds / 1e6:,.0f} -> {deploy.multiply_adds / 1e6:,.0f}',
        )


def compare(model: nn.Module, size: tuple[int, int]) -> Comparison:
    """Count what ``model``, in the training form, costs in both forms; it ends on the meta device.

    Args:
        size: height and width.
    """
    merged = costs(deploy_form(model), size, training=False)
    return Comparison(type(model).__name__, size, costs(model, size), merged)
