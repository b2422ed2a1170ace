"""What would fail on a GPU, found without one.

On fake ``cuda`` tensors, which have a shape and a device but no values, an operator with tensors of
two devices fails as it does on a GPU. A backward pass cannot run on them: that one is on ``meta``.
"""

from importlib import import_module
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from test_tools import CONFIGS, DETECTION, SEGMENTATION, shallow
from timm.utils import reparameterize_model
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastvit_mm
from fastvit_mm import FastViT, ReparameterizeHook
from fastvit_mm.export import formats
from fastvit_mm.export.graphs import graph_of
from fastvit_mm.reparameterize import compare, reparameterize, tensors

CUDA = torch.device('cuda', 0)
ATTENTION = {'model.backbone.arch.attention': (0, 0, 0, 1)}
archs = pytest.mark.parametrize('arch', ['t8', 'sa12'])
tasks = pytest.mark.parametrize('task', CONFIGS, ids=['seg', 'det', 'cls'])


def replace_tensors(module, fn, recurse=True):
    """``nn.Module._apply`` without its changes in place, which fake tensors do not allow."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(fn(value.detach()), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = fn(value)
    return module


def copy_tensor(tensor, memo):
    """PyTorch's own copies the mode with the tensor, and frees what both hold twice."""
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, tensor.requires_grad)
    return memo.setdefault(id(tensor), copied)


@pytest.fixture
def gpu(monkeypatch):
    """A context in which tensors are fake, and models can be moved to ``cuda``."""
    monkeypatch.setattr(nn.Module, '_apply', replace_tensors)
    monkeypatch.setattr(FakeTensor, '__deepcopy__', copy_tensor, raising=False)
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_gpu(model, mode):
    """Move a model as people do: what is neither parameter nor buffer stays on the CPU."""
    if hasattr(model, 'rpn_head'):
        anchors = vars(model.rpn_head.prior_generator)
        anchors.update(tree_map_only(torch.Tensor, mode.from_tensor, anchors))
    return model.to(CUDA)


def devices(module):
    state = [*module.parameters(), *module.buffers()]
    return {tensor.device for tensor in state}


@pytest.fixture
def model(task, tmp_path):
    """A small model of a task, with attention."""
    config = Config.fromfile(shallow(task, tmp_path))
    config.merge_from_dict(ATTENTION)
    return fastvit_mm.init_model(config)


def test_tensors_of_two_devices_are_told(gpu):
    """Otherwise nothing here would prove anything."""
    with gpu, pytest.raises(Exception, match=r'cuda:0.* cpu'):
        nn.Conv2d(3, 4, 1).to(CUDA)(torch.ones(1, 3, 2, 2, device=CUDA)) + torch.ones(4, 2, 2)


@archs
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_forward_and_merge(gpu, arch, layout):
    model = FastViT(arch, drop_path_rate=0.1)
    with gpu:
        model.to(CUDA)
        x = torch.randn(2, 3, 64, 96, device=CUDA).contiguous(memory_format=layout)
        for training in (True, False):
            outputs = [*model.train(training)(x)]
            with torch.no_grad(), torch.autocast('cuda', torch.float16):
                outputs += model(x)
            assert {y.device for y in outputs} == {CUDA}
        merged = reparameterize(model)
        assert devices(merged) == {CUDA}
        with torch.no_grad():
            deployed = [*merged(x), *merged.half()(x.half())]
        assert {y.device for y in deployed} == {CUDA}
        assert [y.shape for y in deployed] == [y.shape for y in outputs]


@pytest.fixture
def compared(monkeypatch):
    """What ``compare`` holds against each other; fake tensors have no distance."""
    seen = []

    def distance(output, reference):
        seen.extend(zip(tensors(output), tensors(reference), strict=True))
        return 0.0

    # the package's own name for it is the function in it
    monkeypatch.setattr(import_module('fastvit_mm.reparameterize'), 'distance', distance)
    return seen


@archs
def test_compare(gpu, compared, arch):
    model = FastViT(arch).eval()
    with gpu:
        model.to(CUDA)
        assert compare(model, reparameterize(model), torch.randn(1, 3, 64, 64, device=CUDA))
    assert compared and all(a.device == b.device == CUDA for a, b in compared)


@tasks
def test_hook(gpu, compared, model, task, tmp_path):
    """A test's first image goes to the model's device by itself."""
    # mmengine reads sizes off tensors, which have none here, to stack a list of images
    collate = pseudo_collate if task == SEGMENTATION else default_collate
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    loader = SimpleNamespace(dataset=[dict(inputs=image)], collate_fn=collate)
    lines = []
    runner = SimpleNamespace(
        model=model, test_dataloader=loader, logger=SimpleNamespace(info=lines.append)
    )
    if task == SEGMENTATION:  # it reads more of a sample than its image
        model.data_preprocessor.test_cfg = None
    hook = ReparameterizeHook()
    with gpu:
        to_gpu(model, gpu)
        hook.before_test(runner)
        hook.before_test_epoch(runner)
        assert runner.model is not model and devices(runner.model) == {CUDA}
        hook.after_test_epoch(runner)
        hook.after_test(runner)
    assert runner.model is model and 'reparameterized' in lines[0]
    assert compared and all(a.device == b.device == CUDA for a, b in compared)


@tasks
@pytest.mark.parametrize('half', [False, True], ids=['float32', 'uint8, float16'])
def test_graphs(gpu, model, task, half, monkeypatch):
    """Every operator of an exported graph has its inputs on one device."""
    graph = graph_of(formats.merge(model), preprocess=half, half=torch.float16 if half else None)
    example = formats.example

    def on_gpu(*args):
        with gpu:
            return example(*args).to(CUDA)

    monkeypatch.setattr(formats, 'example', on_gpu)
    with gpu:
        to_gpu(graph.model, gpu)
        graph.to(CUDA)
    program = formats.trace(graph, (160, 224), 1, dynamic=task == DETECTION)
    outputs = program.graph.output_node().args[0]
    assert len(outputs) == len(graph.names)
    assert {node.meta['val'].device for node in outputs} == {CUDA}


@tasks
def test_what_is_exported_is_a_copy_on_the_cpu(gpu, model, task):
    """Wherever the model is; it stays there."""
    with gpu:
        to_gpu(model, gpu)
        graph = graph_of(formats.merge(model), preprocess=True)
    assert devices(graph) == {torch.device('cpu')}
    assert graph.model.data_preprocessor.device == torch.device('cpu')
    assert devices(model) == {CUDA} and model.data_preprocessor.device == CUDA


class Count(TorchDispatchMode):
    """How many operators run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


def count(model, x):
    """Operators of a training step, forward and backward."""
    with Count() as forward:
        outputs = model(x)
    with Count() as backward:
        sum(y.sum() for y in outputs).backward()
    return forward.count, backward.count


@archs
@pytest.mark.parametrize('with_cp', [False, True])
def test_training_step(arch, with_cp):
    """Away from the CPU nothing is prepared for paths that only a CPU takes: no more operators than
    timm's, and gradients for all."""
    ours = FastViT(arch, out_indices=(3,), with_cp=with_cp).to('meta').train()
    x = torch.randn(2, 3, 64, 96, device='meta')
    with torch.device('meta'):
        theirs = timm.create_model(f'fastvit_{arch}').train()
    ours_, theirs_ = count(ours, x), count(lambda x: [theirs.stages(theirs.stem(x))], x)
    if not with_cp:  # which issues more of its own
        assert ours_[0] <= theirs_[0] and ours_[1] <= theirs_[1]
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        assert parameter.grad.device.type == 'meta'


@archs
def test_operators_of_the_deploy_form(arch):
    ours = reparameterize(FastViT(arch, out_indices=(3,))).to('meta')
    x = torch.randn(2, 3, 64, 96, device='meta')
    with torch.device('meta'):
        theirs = reparameterize_model(timm.create_model(f'fastvit_{arch}').eval())
    counts = []
    for model in (ours, nn.Sequential(theirs.stem, theirs.stages)):
        with torch.no_grad(), Count() as counted:
            model(x)
        counts.append(counted.count)
    assert counts[0] <= counts[1]
