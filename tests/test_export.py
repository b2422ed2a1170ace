"""Exported files: run by runtimes that are not ours, held against the models they came from."""

import copy
import json
import subprocess
import sys
from collections import Counter
from itertools import islice

import mmcv
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from randomize import randomize, relative
from test_tools import (
    CLASSIFICATION,
    CONFIGS,
    DETECTION,
    SEGMENTATION,
    home,  # noqa: F401
    refusal,
    shallow,
    tool,  # noqa: F401
)

import fastvit_mm
from fastvit_mm import FastViT, FastViTError
from fastvit_mm.demo import apply_demo
from fastvit_mm.export import FORMATS, Session, attach, export, formats, verify
from fastvit_mm.export.graphs import AveragePool, paste
from fastvit_mm.export.inputs import real_files
from fastvit_mm.export.inputs import test_sizes as sizes_in_test
from fastvit_mm.export.verify import Limits, compare_detections
from fastvit_mm.reparameterize import absorb_output_norms, reparameterize

tasks = pytest.mark.parametrize('task', CONFIGS, ids=['seg', 'det', 'cls'])
ATTENTION = {'model.backbone.arch.attention': (0, 0, 0, 1)}
SIZE = (96, 64)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """A small network with attention of each task: model, config, checkpoint; all at random."""
    folder = tmp_path_factory.mktemp('models')
    made = {}
    for task in CONFIGS:
        path = shallow(task, folder)
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(ATTENTION)
        apply_demo(cfg, folder / 'data')
        if task == DETECTION:
            cfg.model.test_cfg.rcnn.score_thr = 0.5
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the detector's heads stay as they are initialized
            model = fastvit_mm.init_model(cfg)
        randomize(model.backbone if task == DETECTION else model)
        if task == DETECTION:
            # Scores short of 1, which would all be equal, and masks larger than their rim.
            with torch.no_grad():
                model.rpn_head.rpn_cls.weight *= 0.2
                model.roi_head.mask_head.conv_logits.weight *= 30
                model.roi_head.mask_head.conv_logits.bias += 2
        cfg.dump(folder / f'{path.stem}_demo.py')
        torch.save(
            dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)),
            folder / f'{path.stem}.pth',
        )
        made[task] = (model, folder / f'{path.stem}_demo.py', folder / f'{path.stem}.pth')
    return made


def noise(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def run_onnx(path, image):
    session = onnxruntime.InferenceSession(path)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {'image': image}), strict=True))


@tasks
@pytest.mark.parametrize('format', ['onnx', 'torch', 'openvino'])
def test_every_format_of_every_task(models, task, format, tmp_path):
    model, _, _ = models[task]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = tmp_path / f'model{FORMATS[format].suffix}'
    info = export(model, path, format, size=SIZE, dynamic=True, preprocess=format == 'onnx')
    verdict = verify(model, path, [noise(*SIZE), noise(64, 64), noise(70, 101, seed=1)])
    assert verdict.explained, verdict.text
    assert info['classes'] == list(model.dataset_meta['classes'])
    # the model stays as it was
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # and the proof can fail
    other = randomize(fastvit_mm.init_model(model.cfg), seed=1)
    assert not verify(other, path, [noise(*SIZE)]).explained


def kinds(model, tmp_path, **args):
    """How often each operator is in a backbone's ONNX file."""
    model = reparameterize(model)
    absorb_output_norms(model)
    path = tmp_path / 'model.onnx'
    x = torch.randn(1, 3, 64, 64)
    torch.onnx.export(model, (x,), path, dynamo=True, opset_version=20, verbose=False)
    return Counter(n.op_type for n in onnx.load(path).graph.node)


@pytest.mark.parametrize('arch', ['t8', 'sa12'])
def test_nodes_are_those_of_the_paper(arch, tmp_path):
    """What section 3 of the paper needs after the merge, and no operator more."""
    model = randomize(FastViT(arch, out_indices=(3,)).eval())
    depths = model.settings['depths']
    attention = depths[3] if arch == 'sa12' else 0
    blocks = sum(depths)
    found = kinds(model, tmp_path)
    # stem 3, each of 3 downsamplings 2, each block 7x7 and two 1x1, RepMixer one 3x3, one position
    assert found['Conv'] == 3 + 3 * 2 + 3 * blocks + (blocks - attention) + bool(attention)
    # stem 3, each downsampling 1, each block 1
    assert found['Gelu'] == 3 + 3 + blocks
    # residuals: one of every ConvFFN, one of every attention; RepMixer's is in its kernel.
    # qkv and proj are linear layers, product and bias
    assert found['Add'] == blocks + attention + 2 * attention
    # qkv, q k^T, attention v, proj; no scale before, between or after
    assert found['MatMul'] == 4 * attention and found['Softmax'] == attention
    # to and from (B, N, C), heads apart, k transposed, heads together: views, no arithmetic
    views = {'Reshape', 'Transpose', 'Split', 'Slice', 'Squeeze', 'Gather', 'Unsqueeze'}
    assert set(found) - views <= {'Conv', 'Gelu', 'Add', 'MatMul', 'Softmax'}
    assert sum(found[view] for view in views) <= 17 * attention


def test_output_norms_go_into_the_laterals(models, tmp_path):
    for task in (SEGMENTATION, DETECTION):
        model, _, _ = models[task]
        merged = reparameterize(model)
        x = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            wanted = merged.extract_feat(x)
            absorb_output_norms(merged)
            assert not any('backbone.norm' in k for k in merged.state_dict())
            for a, b in zip(merged.extract_feat(x), wanted, strict=True):
                assert relative(a, b) < 2e-5
    # where something else reads the outputs, they stay
    merged = reparameterize(models[DETECTION][0])
    merged.neck.add_extra_convs = 'on_input'
    absorb_output_norms(merged)
    assert any('backbone.norm' in k for k in merged.state_dict())


def test_onnx_files_explain_themselves(models, tmp_path):
    model, _, _ = models[SEGMENTATION]
    path = tmp_path / 'model.onnx'
    export(model, path, size=SIZE, dynamic=True, preprocess=True, output='labels')
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert {n.domain for n in file.graph.node} == {''} and file.opset_import[0].version >= 17
    assert not any(n.op_type == 'BatchNormalization' for n in file.graph.node)
    props = {p.key: p.value for p in file.metadata_props}
    assert json.loads(props['classes']) == list(model.dataset_meta['classes'])
    shape = file.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ['batch', 'height', 'width', 3]
    # uint8 RGB in, labels out, and nothing else needed: against mmseg's own way with BGR
    images = np.stack([noise(70, 90), noise(70, 90, seed=1)])
    labels = run_onnx(path, images)['labels']
    assert labels.shape == (2, 70, 90) and labels.dtype == np.int64
    from mmseg.structures import SegDataSample

    image = noise(64, 96)
    sample = SegDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96)))
    bgr = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)
    with torch.no_grad():
        wanted = model.test_step(dict(inputs=[bgr], data_samples=[sample]))[0]
    got = run_onnx(path, image[None])['labels'][0]
    assert (got == wanted.pred_sem_seg.data[0].numpy()).mean() > 0.999


def test_detections_are_mmdets(models, tmp_path):
    """One file, images of several sizes, against mmdet's own prediction from a picture file."""
    model = copy.deepcopy(models[DETECTION][0])
    path = tmp_path / 'model.onnx'
    export(model, path, size=SIZE)
    session = onnxruntime.InferenceSession(path)
    # masks as probabilities, in 255ths
    model.roi_head.test_cfg = ConfigDict(model.test_cfg.rcnn, mask_thr_binary=-1)
    mean, std = (model.data_preprocessor.get_buffer(k).numpy() for k in ('mean', 'std'))
    found = 0
    for seed, (height, width) in enumerate([(64, 64), (70, 101), (131, 64), (96, 200)]):
        image = noise(height, width, seed=seed)
        mmcv.imwrite(image[:, :, ::-1], str(tmp_path / 'image.png'))
        config = Config(model.cfg.to_dict())
        scale = dict(type='Resize', scale=(width, height), keep_ratio=False)
        config.test_dataloader.dataset.pipeline[1] = scale
        model.cfg = config
        wanted = fastvit_mm.inference(model, tmp_path / 'image.png').pred_instances
        chances = (np.asarray(wanted.masks) + 0.5) / 255
        sure = np.abs(chances - 0.5) > 0.05  # rounding decides on the others
        given = ((image.transpose(2, 0, 1) - mean) / std)[None].astype(np.float32)
        boxes, scores, labels, masks, crops = session.run(None, {'image': given})
        assert len(boxes) == len(wanted) and masks.shape == (len(boxes), height, width)
        assert crops.shape == (len(boxes), 28, 28)
        assert (scores[:-1] >= scores[1:]).all()
        for i in range(len(boxes)):
            same = (wanted.labels.numpy() == labels[i]) & (
                np.abs(wanted.bboxes.numpy() - boxes[i]).max(1) < 0.5
            )
            twin = np.flatnonzero(same & (np.abs(wanted.scores.numpy() - scores[i]) < 1e-3))
            assert len(twin), (boxes[i], scores[i])
            wrong = ((chances[twin] >= 0.5) ^ masks[i]) & sure[twin]
            assert not wrong.any((1, 2)).all()
        found += len(boxes)
    assert found > 10
    # nothing found is an answer too
    nothing = session.run(None, {'image': np.zeros((1, 3, 64, 64), np.float32)})
    assert len({len(part) for part in nothing}) == 1


@tasks
@pytest.mark.parametrize(
    'format', [pytest.param('onnx'), pytest.param('torch', marks=pytest.mark.slow)]
)
def test_the_metric_of_the_file(models, task, format, tool, tmp_path):  # noqa: F811
    """Exported and evaluated by the tools; the same predictions as the checkpoint's."""
    _, config, checkpoint = models[task]
    path = tmp_path / f'model{FORMATS[format].suffix}'
    args = ['--dynamic', '--with-preprocess'] if format == 'onnx' else ['--dynamic']
    assert tool('export', config, checkpoint, '--format', format, '--out', path, *args)[0] == 0
    metrics, classes = [], []
    for number, weights in enumerate((checkpoint, path)):
        out, shown = tmp_path / f'{number}.json', tmp_path / f'shown{number}'
        assert tool('test', config, weights, '--out', out, '--show-dir', shown)[0] == 0
        metrics.append(json.loads(out.read_text()))
        classes.append([line.split(',') for line in (shown / 'classes.csv').open()])
        assert len(list(shown.glob('0*.jpg'))) == 8
    (wanted, got), scale = metrics, 100 if task == DETECTION else 1  # which is in percent elsewhere
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        if 'time' not in key:
            assert scale * got[key] == pytest.approx(scale * value, abs=0.1), key
    # the table of classes is that of the model as well
    for of_model, of_file in zip(*classes, strict=True):
        assert of_file[0] == of_model[0]
        if task != DETECTION and of_file[0] != 'class':
            numbers = [[float(value) for value in row[2:]] for row in (of_file, of_model)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.5, nan_ok=True)
    refusal(tool('test', config, path, '--reparam'), 'leave out --reparam')


class Planted(torch.nn.Module):
    """A model's graph with one output changed a little."""

    def __init__(self, graph, name):
        super().__init__()
        self.inner, self.names, self.preprocess = graph, graph.names, graph.preprocess
        self.which = graph.names.index(name)

    def forward(self, image):
        outputs = list(self.inner(image))
        outputs[self.which] = outputs[self.which] * 1.01
        return tuple(outputs)


@pytest.mark.parametrize('name', ['vertices', 'joints', 'points'])
def test_every_output_is_compared(name, tmp_path, monkeypatch):
    """Three outputs, one of them 1 % too large, whichever it is."""
    from test_hand_mesh_models import build

    model, path = build('vertices'), tmp_path / 'model.pt2'
    image = noise(64, 64)
    export(model, path, 'torch', size=(64, 64))
    verdict = verify(model, path, [image])
    assert verdict.explained and verdict.text.count('rounding') == 3, verdict.text
    trace = formats.trace
    monkeypatch.setattr(
        formats, 'trace', lambda g, *args, **kw: trace(Planted(g, name), *args, **kw)
    )
    export(model, path, 'torch', size=(64, 64))
    verdict = verify(model, path, [image])
    assert not verdict.explained and f'{name}: largest relative difference 1.0e-02' in verdict.text


@pytest.mark.parametrize('name', ['boxes', 'scores', 'labels', 'masks', 'mask_crops'])
def test_every_output_of_a_detector_is_compared(name):
    """Two detections, one output of which is in the other's place."""
    halves = torch.zeros(2, 28, 28)
    halves[0, :14] = halves[1, :, :14] = 0.9
    boxes = torch.tensor([[2.0, 2, 12, 16], [20, 4, 30, 24]])
    pasted = paste(halves, boxes, (32, 32))
    found = dict(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 2]))
    wanted = dict(found, masks=(pasted * 255).to(torch.uint8))
    got = dict(found, masks=pasted >= 0.5, mask_crops=halves)
    cfg = ConfigDict(score_thr=0.05, max_per_img=100, mask_thr_binary=0.5)
    verdict = compare_detections([(wanted, got)], cfg, Limits())
    assert verdict.explained, verdict.text
    got[name] = got[name].flip(0)
    assert not compare_detections([(wanted, got)], cfg, Limits()).explained


def square(chance, *, size=20, row=None):
    """One detection whose mask has a chance of ``chance`` in its upper half, ``row`` its own."""
    soft = torch.zeros(1, size, size)
    soft[:, : size // 2] = chance
    if row is not None:
        soft[:, size // 2] = row
    box = torch.tensor([[0.0, 0.0, size, size]])
    return dict(boxes=box, scores=torch.tensor([0.9]), labels=torch.tensor([1]), masks=soft)


@pytest.mark.parametrize(
    'wanted, got, explained',
    [
        (0.5019, 0.4981, True),  # an edge on the centres of its pixels: either is right
        (0.4981, 0.5019, True),
        (0.54, 0.4, True),
        (0.56, 0.4, False),  # sure of what the file leaves out
        (0.44, 0.6, False),
        (1, 0, False),
    ],
)
def test_a_row_of_a_mask_may_differ_if_rounding_decides(wanted, got, explained):
    wanted, got = square(0.9, row=wanted), square(0.9, row=got)
    wanted['masks'] = (wanted['masks'] * 255).to(torch.uint8)  # as mmdet gives them
    got['mask_crops'] = got['masks']
    got['masks'] = got['masks'] >= 0.5
    cfg = ConfigDict(score_thr=0.05, max_per_img=100, mask_thr_binary=0.5)
    verdict = compare_detections([(wanted, got)], cfg, Limits())
    assert verdict.explained == explained, verdict.text


def test_onnx_runtime_computes_where_the_model_is(models, tmp_path, monkeypatch):
    """In float32 there as well: TF32 keeps three digits."""
    model = models[CLASSIFICATION][0]
    path = tmp_path / 'model.onnx'
    export(model, path, size=(64, 64))
    asked, session = [], onnxruntime.InferenceSession

    def recorded(path, options, providers):
        asked.append(providers)
        return session(path, options, providers=['CPUExecutionProvider'])

    monkeypatch.setattr(onnxruntime, 'InferenceSession', recorded)
    cuda = ('CUDAExecutionProvider', dict(device_id=1, use_tf32=0))
    for found in (['CPUExecutionProvider'], ['Tensorrt', cuda[0], 'CPUExecutionProvider']):
        monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda found=found: found)
        Session(path)
        Session(path, 'cuda:1')
        attach(copy.deepcopy(model), path)
    cpu = ['CPUExecutionProvider']
    assert asked == [cpu, cpu, cpu, cpu, [cuda, *cpu], cpu]


def test_the_model_of_an_onnx_file_may_be_on_a_gpu(models, tmp_path, monkeypatch):
    """Whose device the session gets, though all else of it is on the CPU."""
    path = tmp_path / 'model.onnx'
    export(models[CLASSIFICATION][0], path, size=(64, 64))
    asked = []

    def session(path, device):
        asked.append(torch.device(device))
        return Session(path)

    monkeypatch.setattr('fastvit_mm.export.runtime.Session', session)
    attach(copy.deepcopy(models[CLASSIFICATION][0]).to('meta'), path)
    assert asked == [torch.device('meta')]


@pytest.mark.parametrize('preprocess', [False, True])
def test_bgr_is_refused(models, tmp_path, preprocess):
    """Files take RGB: a model that was trained on BGR would answer wrongly without a word."""
    for task in CONFIGS:
        model = copy.deepcopy(models[task][0])
        for name in ('to_rgb', 'channel_conversion', '_channel_conversion'):
            if hasattr(model.data_preprocessor, name):
                setattr(model.data_preprocessor, name, False)
        with pytest.raises(FastViTError, match='BGR'):
            export(model, tmp_path / 'model.onnx', size=SIZE, preprocess=preprocess)
    assert not list(tmp_path.iterdir())


def test_fixed_sizes_and_batches(models, tmp_path):
    model, _, _ = models[CLASSIFICATION]
    path = tmp_path / 'model.onnx'
    info = export(model, path, size=(64, 96), batch=2)
    assert (info['batch'], info['size']) == (2, [64, 96])
    session = Session(path)
    x = torch.randn(5, 3, 64, 96)
    with torch.no_grad():
        assert relative(session(x)['logits'], model(x, mode='tensor')) < 1e-5
    with pytest.raises(FastViTError, match='takes images of 64 x 96 pixels, not of 64 x 64'):
        session(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('cells', [2, 6, (3, 5), (None, 4)])
@pytest.mark.parametrize('size', [(1, 1), (3, 5), (6, 6), (7, 16), (16, 7)])
def test_pooling_to_a_grid_is_pytorchs(cells, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = torch.nn.AdaptiveAvgPool2d(cells)(x)
    assert relative(AveragePool(cells)(x), wanted) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize('dynamic', [True, False])
def test_upernet(models, dynamic, tmp_path):
    """Its features are pooled to grids; at each size, the file predicts what mmseg does."""
    cfg = copy.deepcopy(models[SEGMENTATION][0].cfg)
    widths, head = cfg.model.neck.in_channels, cfg.model.decode_head
    del cfg.model.neck
    for key in ('feature_strides', 'in_channels', 'in_index'):
        head.pop(key)
    head.update(type='UPerHead', in_channels=widths, in_index=[0, 1, 2, 3], channels=32)
    head.update(pool_scales=(1, 2, 3, 6))
    model = randomize(fastvit_mm.init_model(cfg))
    export(model, path := tmp_path / 'uper.onnx', size=(96, 160), dynamic=dynamic)
    session = Session(path)
    others = [(64, 64), (224, 160), (288, 352), (100, 130)] if dynamic else []
    for size in [(96, 160), *others]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            wanted = F.interpolate(model(x, mode='tensor'), size, mode='bilinear')
        assert relative(session(x)['logits'], wanted) < 1e-5, size
    if dynamic:  # the whole way of an image, at the sizes that the pipeline gives
        image = noise(70, 101)
        wanted = fastvit_mm.inference(model, image).pred_sem_seg.data
        found = fastvit_mm.inference(attach(copy.deepcopy(model), path), image).pred_sem_seg.data
        assert len(wanted.unique()) > 1 and (found == wanted).float().mean() > 0.999


@pytest.mark.parametrize(
    ('task', 'steps', 'mode', 'named'),
    [
        (CLASSIFICATION, {}, {}, None),
        (SEGMENTATION, {}, {}, (64, 64)),
        (SEGMENTATION, dict(scale=(160, 96), keep_ratio=False), {}, (96, 160)),
        (SEGMENTATION, {}, dict(mode='slide', crop_size=(64, 32), stride=(32, 16)), (64, 32)),
        (DETECTION, {}, {}, None),
    ],
)
def test_a_static_file_takes_what_the_test_gives(models, task, steps, mode, named):
    """The sizes are those that the backbone sees when the config's own test set is predicted."""
    cfg = copy.deepcopy(models[task][0].cfg)
    dataset = cfg.test_dataloader.dataset
    next(s for s in dataset.pipeline if 'Resize' in s['type']).update(steps)
    cfg.test_pipeline = dataset.pipeline
    if mode:
        cfg.model.test_cfg = mode
    model = fastvit_mm.init_model(cfg)
    seen = set()
    model.backbone.register_forward_pre_hook(
        lambda module, args: seen.add(tuple(args[0].shape[2:])) and None
    )
    fastvit_mm.inference(model, list(islice(real_files(cfg), 16)))
    found, origin = sizes_in_test(model, cfg)
    if mode.get('mode') == 'slide':
        assert origin == 'the sliding window of the test'
    else:
        number = min(16, len(list(real_files(cfg))))
        assert origin.startswith('the most frequent' if len(found) > 1 else 'the size')
        assert origin.endswith(f' of the first {number} test images')
    if task == DETECTION:  # whose graph pads to multiples of 32
        found = {tuple(-(-n // 32) * 32 for n in size) for size in found}
    assert set(found) == seen
    dataset.data_root = 'nowhere'  # then the steps say what they can
    found, origin = sizes_in_test(model, cfg)
    assert named in (None, *found)
    assert origin.startswith(('the size in the test pipeline', 'the sliding window of the test'))


def test_half(models, tmp_path):
    model, _, _ = models[CLASSIFICATION]
    for format in ('onnx', 'torch', 'openvino'):
        path = tmp_path / f'model{FORMATS[format].suffix}'
        export(model, path, format, size=(64, 64), half=True, output='probabilities')
        verdict = verify(model, path, [noise(64, 64, seed=i) for i in range(3)])
        assert verdict.explained, (format, verdict.text)
        out = Session(path)(torch.randn(1, 3, 64, 64))['probabilities']
        assert out.dtype == torch.float32 and float(out.sum()) == pytest.approx(1, abs=1e-2)
    weights = onnx.load(tmp_path / 'model.onnx').graph.initializer
    large = [w for w in weights if np.prod(w.dims) > 16]
    assert large and all(w.data_type == onnx.TensorProto.FLOAT16 for w in large)


@pytest.mark.parametrize('task', [CLASSIFICATION, SEGMENTATION])
def test_core_ml(models, task, tmp_path):
    import coremltools

    model, _, _ = models[task]
    path = tmp_path / 'model.mlpackage'
    output = 'probabilities' if task == CLASSIFICATION else 'labels'
    half = task == CLASSIFICATION
    export(model, path, 'coreml', size=(64, 96), preprocess=True, half=half, output=output)
    verdict = verify(model, path, [])
    assert verdict.explained, verdict.text
    other = randomize(fastvit_mm.init_model(model.cfg), seed=1)
    assert not verify(other, path, []).explained
    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec()
    image = spec.description.input[0].type.imageType
    assert (image.height, image.width) == (64, 96)
    if task == CLASSIFICATION:
        assert spec.description.predictedFeatureName == 'classLabel'
    with pytest.raises(FastViTError, match='without --dynamic'):
        export(model, path, 'coreml', size=(64, 64), dynamic=True)
    with pytest.raises(FastViTError, match='export a detector as ONNX'):
        export(models[DETECTION][0], path, 'coreml', size=(64, 64))


def test_a_file_that_differs_is_moved_aside(models, tool, tmp_path, monkeypatch):  # noqa: F811
    """A bias that the exporter loses, in a file of two parts."""
    from fastvit_mm.export import formats

    _, config, checkpoint = models[CLASSIFICATION]

    def careless(model):
        model = merge(model)
        model.head.fc.bias.data += 0.01
        return model

    merge = formats.merge
    monkeypatch.setattr(formats, 'merge', careless)
    out = tmp_path / 'model.xml'
    code, _ = tool('export', config, checkpoint, '--format', 'openvino', '--out', out)
    assert code == 1
    assert not out.exists() and not out.with_suffix('.bin').exists()
    assert (tmp_path / 'model.failed.xml').exists() and (tmp_path / 'model.failed.bin').exists()


def test_signals_after_openvino(models, tmp_path):
    """Ctrl-C, or the end of a child process, once several files have been run."""
    export(models[CLASSIFICATION][0], tmp_path / 'model.xml', 'openvino', size=SIZE)
    program = """
import os, signal, sys
from fastvit_mm.export import Session
signal.signal(signal.SIGUSR1, lambda *_: print('survived'))
first, second = Session(sys.argv[1]), Session(sys.argv[1])
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""
    call = [sys.executable, '-c', program, tmp_path / 'model.xml']
    run = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, 'survived\n'), run.stderr


def test_what_cannot_be_exported(models, tool, tmp_path, monkeypatch):  # noqa: F811
    _, config, checkpoint = models[CLASSIFICATION]
    call = ('export', config, checkpoint, '--out', tmp_path / 'model.onnx')
    refusal(tool('export', config, checkpoint, '--out', tmp_path / 'model.pt2'), '.onnx')
    refusal(tool(*call, '--output', 'labels'), "logits or probabilities, not 'labels'")
    code, err = tool(*call, '--size', '16', '16')
    assert code == 2 and 'at least 32' in err.splitlines()[-1]
    detector = ('export', *models[DETECTION][1:], '--out', tmp_path / 'model.onnx')
    refusal(tool(*detector, '--batch', '2'), 'one image at a time')
    assert not list(tmp_path.iterdir())
    for package, format in (
        ('onnxscript', 'onnx'),
        ('onnxruntime', 'onnx'),
        ('openvino', 'openvino'),
        ('coremltools', 'coreml'),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            out = tmp_path / f'model{FORMATS[format].suffix}'
            result = tool('export', config, checkpoint, '--format', format, '--out', out)
            refusal(result, f'file needs {package}: pip install {package}')
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_ours(models, tool, tmp_path):  # noqa: F811
    _, config, _ = models[CLASSIFICATION]
    refusal(tool('test', config, tmp_path / 'no.onnx'), 'no.onnx does not exist')
    (broken := tmp_path / 'broken.onnx').write_bytes(b'not a model')
    refusal(tool('test', config, broken), 'broken.onnx cannot be read')
    torch.onnx.export(
        torch.nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / 'other.onnx', verbose=False
    )
    refusal(tool('test', config, tmp_path / 'other.onnx'), 'not written by tools/export.py')
    model, config, _ = models[SEGMENTATION]
    export(model, tmp_path / 'seg.onnx', size=(64, 64))
    refusal(tool('test', models[CLASSIFICATION][1], tmp_path / 'seg.onnx'), 'is a segmentor')
