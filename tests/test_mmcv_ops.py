"""mmcv's public operators on the substitute for its compiled extension.

nms, soft_nms, roi_align and the deformable convolutions are compared with recorded answers of
the compiled extension (``data/make_mmcv_ops.py``). roi_pool, sigmoid_focal_loss and
ms_deform_attn have no compiled CPU kernel, hence no record: they are compared with a loop, with
the formula (and torchvision's loss) and with mmcv's own PyTorch version, in float64. Each
comparison runs on a GPU as well where there is one.
"""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from randomize import randomize, relative
from test_tools import DETECTION, shallow

import fastvit_mm
from fastvit_mm.mmcv_ops import COVERED, install

import mmcv._ext  # isort: skip
import mmcv.ops  # isort: skip
from mmdet.structures import DetDataSample  # isort: skip

RECORD = runpy.run_path(str(Path(__file__).parent / 'data' / 'make_mmcv_ops.py'))
CASES, evaluate = RECORD['CASES'], RECORD['evaluate']

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
on_devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=no_gpu)])
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
in_precisions = pytest.mark.parametrize(('dtype', 'tolerance'), PRECISIONS)
substituted = pytest.mark.skipif(
    hasattr(mmcv._ext, '__file__'), reason='mmcv has its compiled extension here'
)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture(scope='module')
def record():
    with np.load(RECORD['FILE']) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def assert_close(found, wanted, tolerance):
    """The largest difference is at most ``tolerance`` of the largest value."""
    assert found.shape == wanted.shape
    if not wanted.is_floating_point():
        assert torch.equal(found, wanted)
    elif wanted.numel():
        difference = (found.double() - wanted.double()).abs().max()
        assert difference <= tolerance * wanted.abs().max()


def compare(call, reference, inputs, dtype, tolerance, device):
    """Outputs and gradients of ``call`` are those of ``reference`` in float64."""
    found = evaluate(call, inputs, dtype, device)
    wanted = evaluate(reference, inputs, torch.float64)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name], tolerance)


# ----------------------------------------------------------------------------- recorded answers


@on_devices
@pytest.mark.parametrize(
    ('case', 'dtype', 'tolerance'),
    # Non-maximum suppression is compiled for float32 alone.
    [(case, *each) for case in CASES for each in PRECISIONS[: 1 if 'nms' in case else 2]],
)
def test_recorded(record, case, dtype, tolerance, device):
    def part(kind):
        prefix = f'{case}/{kind}/'
        return {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}

    found, wanted = evaluate(CASES[case][0], part('input'), dtype, device), part('output')
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name], tolerance)


@pytest.mark.parametrize('case', ['nms', 'soft_nms'])
def test_nms_numpy(record, case):
    inputs = (record[f'{case}/input/{name}'].numpy() for name in ('boxes', 'scores'))
    dets, kept = getattr(mmcv.ops, case)(*inputs, iou_threshold=0.3)
    assert isinstance(dets, np.ndarray)
    assert np.array_equal(kept, record[f'{case}/output/1'].numpy())


@on_devices
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_nms_dtypes(record, dtype, device):
    boxes, scores = (record[f'nms/input/{name}'] for name in ('boxes', 'scores'))
    boxes = boxes.to(device, dtype)
    _, kept = mmcv.ops.nms(boxes, scores.to(device), 0.3)
    _, wanted = mmcv.ops.nms(boxes.float(), scores.to(device), 0.3)
    assert torch.equal(kept, wanted)


# --------------------------------------------------------------------------- other references


def loop_roi_pool(features, rois, size, scale):
    bins = []
    for roi in rois.tolist():
        plane = features[int(roi[0])]
        x1, y1, x2, y2 = roi[1] * scale, roi[2] * scale, (roi[3] + 1) * scale, (roi[4] + 1) * scale
        for i in range(size[0]):
            for j in range(size[1]):
                top = np.floor(y1 + i * (y2 - y1) / size[0]).clip(0).astype(int)
                left = np.floor(x1 + j * (x2 - x1) / size[1]).clip(0).astype(int)
                bottom = np.ceil(y1 + (i + 1) * (y2 - y1) / size[0]).clip(0).astype(int)
                right = np.ceil(x1 + (j + 1) * (x2 - x1) / size[1]).clip(0).astype(int)
                cell = plane[:, top:bottom, left:right].flatten(1)
                empty = x2 <= x1 or y2 <= y1 or not cell.numel()
                bins.append(plane.new_zeros(len(plane)) if empty else cell.amax(1))
    return torch.stack(bins).view(len(rois), *size, -1).permute(0, 3, 1, 2)


@on_devices
@in_precisions
def test_roi_pool(dtype, tolerance, device):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(12, 2, generator=generator) * 60 - 10  # some reach over an edge
    sides = torch.rand(12, 2, generator=generator) * 30
    rois = torch.cat([torch.arange(12)[:, None] % 2, corner, corner + sides], 1)
    rois[0, 1:] = torch.tensor([90.0, 90, 99, 99])  # outside
    rois[1, 1:] = torch.tensor([20.0, 20, 10, 30])  # turned over
    rois[2, 1:] = torch.tensor([8.0, 8, 15, 15])  # whole pixels
    features = torch.randn(2, 3, 11, 13, generator=generator)
    compare(
        lambda features, rois: mmcv.ops.RoIPool((3, 4), 0.25)(features, rois),
        lambda features, rois: loop_roi_pool(features, rois, (3, 4), 0.25),
        {'features!': features, 'rois': rois},
        dtype,
        tolerance,
        device,
    )


def test_roi_pool_ties():
    features = torch.zeros(1, 1, 6, 6, requires_grad=True)
    rois = torch.tensor([[0.0, 1, 2, 4, 5]])
    mmcv.ops.RoIPool(1)(features, rois).sum().backward()
    assert features.grad.nonzero().tolist() == [[0, 0, 2, 1]]  # the first of equals


def focal_inputs(generator, weight):
    inputs = {
        'input!': torch.randn(40, 5, generator=generator).mul(2).clamp(-5, 5),
        'target': torch.arange(40) % 6,  # 5: background
    }
    if weight:
        inputs['weight'] = torch.rand(5, generator=generator)
    return inputs


def focal_formula(input, target, weight=None):
    own = F.one_hot(target, input.shape[1] + 1)[:, :-1].bool()
    p = torch.where(own, input, -input).sigmoid()
    loss = -(0.7 - 0.4 * own.double()) * (1 - p) ** 1.5 * p.log()
    if weight is not None:
        loss = loss * torch.cat([weight, weight.new_ones(1)])[target, None]
    return loss


@on_devices
@in_precisions
@pytest.mark.parametrize('weight', [False, True])
def test_sigmoid_focal_loss(weight, dtype, tolerance, device):
    def call(input, target, weight=None):
        return mmcv.ops.sigmoid_focal_loss(input, target, 1.5, 0.3, weight, 'none')

    inputs = focal_inputs(torch.Generator().manual_seed(1), weight)
    compare(call, focal_formula, inputs, dtype, tolerance, device)


def test_sigmoid_focal_loss_torchvision():
    from torchvision.ops import sigmoid_focal_loss

    inputs = focal_inputs(torch.Generator().manual_seed(2), False)
    for reduction in ('none', 'mean', 'sum'):

        def reference(input, target, reduction=reduction):
            own = F.one_hot(target, input.shape[1] + 1)[:, :-1].to(input)
            loss = sigmoid_focal_loss(input, own, 0.25, 2.0, 'none')
            return {'none': loss, 'mean': loss.sum() / len(loss), 'sum': loss.sum()}[reduction]

        def call(input, target, reduction=reduction):
            return mmcv.ops.sigmoid_focal_loss(input, target, 2.0, 0.25, None, reduction)

        compare(call, reference, inputs, torch.float64, 1e-10, 'cpu')


def test_sigmoid_focal_loss_edges():
    input = torch.tensor([[-200.0, 200.0], [200.0, -200.0], [0.5, 0.5]], requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(input, torch.tensor([0, 0, -1]), 2.0, 0.25, None, 'none')
    # Where a probability rounds to 0, mmcv takes the smallest normal float32 instead.
    log = -np.log(np.finfo(np.float32).tiny)
    assert_close(loss[:2], torch.tensor([[0.25 * log, 0.75 * log], [0, 0]]), 1e-6)
    # A label that is no class is background.
    assert_close(loss[2], 0.75 * input[2].sigmoid() ** 2 * F.softplus(input[2]), 1e-6)
    loss.sum().backward()
    assert_close(input.grad[:2], torch.tensor([[-0.25, 0.75], [0, 0]]), 1e-6)


def attention_inputs(generator, queries=7):
    shapes = torch.tensor([[6, 4], [3, 5], [1, 2]])
    sizes = shapes.prod(1)
    return {
        'value!': torch.randn(2, int(sizes.sum()), 2, 8, generator=generator),
        'shapes': shapes,
        'starts': sizes.cumsum(0) - sizes,
        # Some points lie outside.
        'locations!': torch.rand(2, queries, 2, 3, 4, 2, generator=generator) * 1.4 - 0.2,
        'weights!': torch.rand(2, queries, 2, 3, 4, generator=generator),
    }


def attention(value, shapes, starts, locations, weights):
    function = mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction
    return function.apply(value, shapes, starts, locations, weights, 64)


@on_devices
@in_precisions
def test_ms_deform_attn(dtype, tolerance, device):
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    compare(
        attention,
        lambda value, shapes, starts, locations, weights: multi_scale_deformable_attn_pytorch(
            value, shapes, locations, weights
        ),
        attention_inputs(torch.Generator().manual_seed(3)),
        dtype,
        tolerance,
        device,
    )


# -------------------------------------------------------------------------- half, empty, layout


@on_devices
@pytest.mark.parametrize('with_rois', [torch.float32, torch.bfloat16])
def test_roi_align_in_bfloat16(with_rois, device):
    """torchvision has none. Boxes stay exact if they came so, as under autocast."""
    call, inputs = CASES['roi_align'][0], CASES['roi_align'][1](torch.Generator().manual_seed(4))
    inputs = {name.strip('!'): value for name, value in inputs.items()}
    rounded = {name: value.bfloat16() for name, value in inputs.items()}
    if with_rois == torch.float32:
        rounded['rois'] = inputs['rois']
    exact = {name: value.float() for name, value in rounded.items()}
    results = []
    for given in (rounded, exact):
        given = {name: value.to(device) for name, value in given.items()}
        given['features'].requires_grad_()
        out = call(**given)
        out.float().square().sum().backward()
        results.append((out, given['features'].grad))
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        assert_close(found, wanted, 2e-2)


@pytest.mark.parametrize('way', ['autocast', 'whole model'])
def test_detector_in_bfloat16(way, tmp_path):
    torch.manual_seed(0)
    model = randomize(fastvit_mm.init_model(shallow(DETECTION, tmp_path)))
    low, high = torch.rand(2, 40, 2).mul(64).unbind(0)
    rois = torch.cat([torch.zeros(40, 1), low, low + high + 8], 1)
    x, size = torch.randn(1, 3, 128, 128), (128, 128)

    def heads(model, x, rois):
        found = model.roi_head._bbox_forward(model.extract_feat(x), rois)
        sample = DetDataSample(metainfo=dict.fromkeys(('img_shape', 'batch_input_shape'), size))
        sample.set_metainfo(dict(ori_shape=size, scale_factor=(1.0, 1.0)))
        predicted = model(x, [sample], mode='predict')[0].pred_instances
        assert len(predicted) and predicted.bboxes.isfinite().all()
        return found['cls_score'], found['bbox_pred']

    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.bias[0] += 5
        wanted = heads(model, x, rois)
        with torch.autocast('cpu', torch.bfloat16, enabled=way == 'autocast'):
            if way == 'whole model':
                model, x = model.bfloat16(), x.bfloat16()
            outs = heads(model, x, rois)
    for out, exact in zip(outs, wanted, strict=True):
        assert out.dtype == torch.bfloat16
        assert relative(out.float(), exact) < 0.1  # some 0.004 in each of two dozen layers


@on_devices
@pytest.mark.parametrize(
    'case', ['roi_align', 'deform_conv', 'modulated_deform_conv_options', 'attention', 'focal']
)
def test_half(case, device):
    generator = torch.Generator().manual_seed(4)
    if case == 'attention':
        call, inputs = attention, attention_inputs(generator)
    elif case == 'focal':
        call, inputs = mmcv.ops.sigmoid_focal_loss, focal_inputs(generator, False)
    else:
        call, inputs = CASES[case][0], CASES[case][1](generator)
        if case == 'roi_align':
            inputs['rois'] = inputs['rois'].round()
    inputs = {k: v.half().float() if v.is_floating_point() else v for k, v in inputs.items()}
    found = evaluate(call, inputs, torch.float16, device)
    wanted = evaluate(call, inputs, torch.float32, device)
    # Gradients of positions jump where a rounded point crosses a pixel.
    for name in found.keys() - {'offset', 'locations'}:
        assert found[name].dtype is torch.float16
        assert_close(found[name], wanted[name], 2e-2)


@on_devices
def test_empty(device):
    none = torch.zeros(0, 4, device=device)
    for function in (mmcv.ops.nms, mmcv.ops.soft_nms):
        dets, kept = function(none, none[:, 0], 0.5)
        assert dets.shape == (0, 5)
        assert kept.shape == (0,) and kept.dtype is torch.int64
    features = torch.rand(2, 3, 8, 8, device=device, requires_grad=True)
    rois = torch.zeros(0, 5, device=device)
    for layer in (mmcv.ops.RoIAlign((2, 3), 0.5), mmcv.ops.RoIPool((2, 3), 0.5)):
        pooled = layer(features, rois)
        assert pooled.shape == (0, 3, 2, 3)
        assert not torch.autograd.grad(pooled.sum(), features)[0].any()
    logits = torch.zeros(0, 5, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long, device=device)
    loss = mmcv.ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'sum')
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 5)
    inputs = attention_inputs(torch.Generator().manual_seed(5), queries=0)
    assert evaluate(attention, inputs, device=device)['0'].shape == (2, 0, 16)


@pytest.mark.parametrize('name', ['DeformConv2dPack', 'ModulatedDeformConv2dPack'])
def test_channels_last(name):
    torch.manual_seed(0)
    layer = getattr(mmcv.ops, name)(4, 6, 3)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    images = torch.randn(2, 4, 9, 7)
    answers = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = images.detach().to(memory_format=memory_format).requires_grad_()
        layer.zero_grad()
        output = layer.to(memory_format=memory_format)(leaf)
        output.square().sum().backward()
        answers.append([output, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for found, wanted in zip(*answers, strict=True):
        assert_close(found, wanted, 1e-5)


# ------------------------------------------------------------------------------- the substitute


@substituted
def test_uncovered():
    carafe = mmcv.ops.CARAFE(3, 1, 2)  # can be built
    with pytest.raises(NotImplementedError, match="'carafe_forward' needs mmcv's") as error:
        carafe(torch.zeros(1, 4, 5, 5), torch.zeros(1, 9, 10, 10))
    assert '\n' not in str(error.value)
    pool = mmcv.ops.RoIAlign(2, pool_mode='max')
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        pool(torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]))


@substituted
def test_module():
    assert all(getattr(mmcv._ext, name) is function for name, function in COVERED.items())
    assert mmcv._ext.__spec__.name == 'mmcv._ext'
    assert not hasattr(mmcv._ext, '__wrapped__')
    assert mmcv.ops.get_compiler_version() == 'n/a'
    finders, module = list(sys.meta_path), mmcv._ext
    install()
    assert sys.meta_path == finders
    import mmcv._ext as again

    assert again is module


def run(code, *args):
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, *map(str, args)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_models_can_be_imported():
    run(
        'import fastvit_mm, mmdet.models, mmseg.models\n'
        'from mmengine.model import revert_sync_batchnorm\n'
        'from mmengine.utils.dl_utils.misc import mmcv_full_available\n'
        'assert mmcv_full_available()'
    )


@pytest.mark.slow
@substituted
@pytest.mark.parametrize('before', ['', 'import mmcv.cnn'])
def test_install_after_a_failure(before):
    run(
        f'{before}\n'
        'try:\n    import mmcv.ops\n'
        'except ModuleNotFoundError as error:\n    assert error.name == "mmcv._ext"\n'
        'else:\n    raise SystemExit("no failure")\n'
        'import fastvit_mm, importlib.util\n'
        'from mmcv.utils.ext_loader import check_ops_exist\n'
        'assert check_ops_exist() and importlib.util.find_spec("mmcv._ext")\n'
        'import mmcv.ops'
    )


def test_install_is_lazy():
    run(
        'import runpy, sys, torch\n'
        'runpy.run_path("fastvit_mm/mmcv_ops.py")["install"]()\n'
        'assert not {"mmcv", "torchvision"} & set(sys.modules)'
    )


@pytest.mark.slow
@pytest.mark.parametrize('late', [False, True])
def test_a_compiled_extension_is_left_alone(tmp_path, late):
    (tmp_path / '_ext.py').write_text('def __getattr__(name):\n    return "compiled"\n')
    lines = ['import mmcv; mmcv.__path__.insert(0, sys.argv[1])', 'import fastvit_mm']
    lines = lines[::-1] if late else lines
    run(
        f'import sys\n{lines[0]}\n{lines[1]}\n'
        'import mmcv._ext, mmcv.ops\n'
        'assert mmcv._ext.__file__.startswith(sys.argv[1])\n'
        'assert sys.modules["mmcv.ops.nms"].ext_module.nms == "compiled"',
        tmp_path,
    )
