"""MobileCLIP's image encoders and FastVLM's FastViTHD: against timm's, which are not ours."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from PIL import Image
from randomize import randomize, relative
from torch.utils.flop_counter import FlopCounterMode

import fastvit_mm
from fastvit_mm import ARCHS, FastViT, FastViTError, FastViTNeck, weights
from fastvit_mm.export import FORMATS, export, verify
from fastvit_mm.models.archs import parse_arch
from fastvit_mm.prediction.results import results
from fastvit_mm.zero_shot import ZeroShotHead, order_of

safetensors = pytest.importorskip('safetensors.torch')

# name in timm, width of the embeddings, published parameters of the image tower in millions
FAMILY = {
    'mci0': ('mci0', 512, 11.4),
    'mci1': ('mci1', 512, 21.5),
    'mci2': ('mci2', 512, 35.7),
    'mci3': ('mci3', 768, 125.1),
    'mci4': ('mci4', 768, 321.6),
    'hd': ('mci3', 768, 125.1),  # timm has no FastViTHD, whose structure is MCi3's
}


class Encoder(nn.Module):
    """Backbone, last block and projection: stage outputs and embeddings."""

    def __init__(self, arch, embedding, **args):
        super().__init__()
        settings = parse_arch(arch)
        self.backbone = FastViT(arch, out_indices=tuple(range(len(settings['depths']))), **args)
        width = settings['widths'][-1]
        self.neck = FastViTNeck(width, deploy=args.get('deploy', False))
        self.head = nn.ModuleDict(dict(fc=nn.Linear(2 * width, embedding)))

    def forward(self, x):
        features = self.backbone(x)
        return features, self.head['fc'](self.neck(features)[0])


def shallow(name):
    """The settings of a network, with one block per stage: float64 is slow on a CPU."""
    settings = parse_arch(name)
    return {**settings, 'depths': (1,) * len(settings['depths'])}


def ours_and_timms(name, dtype=torch.float64):
    """Our encoder and timm's, shallow, with the same random weights and statistics."""
    theirs_name, embedding, _ = FAMILY[name]
    arch = shallow(name)
    ours = randomize(Encoder(arch, embedding), seed=3).to(dtype)
    theirs = timm.create_model(
        f'fastvit_{theirs_name}', num_classes=embedding, layers=arch['depths']
    ).to(dtype)
    state = {timms(k): v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


def timms(key):
    return key.replace('backbone.', '').replace('neck.', '')


def images(dtype=torch.float64, batch=2, size=(64, 96), seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


WIDE = ('mci3', 'mci4', 'hd')
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in WIDE else n for n in FAMILY]


@pytest.mark.parametrize('name', FAMILY)
def test_names_shapes_and_sizes(name):
    """At full depth, without memory for the weights."""
    theirs_name, embedding, millions = FAMILY[name]
    with torch.device('meta'):
        ours = Encoder(name, embedding)
        theirs = timm.create_model(f'fastvit_{theirs_name}', num_classes=embedding)
    shapes = {timms(k): v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()}
    count = sum(p.numel() for p in ours.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.004)
    macs = []
    for model in (ours.eval(), theirs.eval()):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 256, 256, device='meta'))
        macs.append(counter.get_total_flops())
    assert macs[0] == macs[1] > 0


@pytest.mark.parametrize('name', NAMES)
def test_outputs_equal_timms(name):
    ours, theirs = (m.eval() for m in ours_and_timms(name))
    x = images()
    with torch.no_grad():
        last, features = theirs.forward_intermediates(x)
        embeddings = theirs.forward_head(last)
        outs, own = ours(x)
    assert len(outs) == len(features) == len(parse_arch(name)['depths'])
    for i, (out, feature) in enumerate(zip(outs, features, strict=True)):
        assert out.shape[2:] == tuple(-(-s // (4 * 2**i)) for s in (64, 96))
        assert relative(out, feature) < 1e-10
    assert relative(own, embeddings) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mci0', 'mci2', 'hd'])
def test_gradients_and_statistics_equal_timms(name):
    ours, theirs = (m.train() for m in ours_and_timms(name))
    x = images(size=(128, 96))
    ours(x)[1].square().mean().backward()
    theirs(x).square().mean().backward()
    references = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        reference = references[timms(key)].grad
        assert parameter.grad is not None, f'{key} gets no gradient'
        if reference.abs().max() < 1e-12:  # biases before a BatchNorm: zero but for rounding
            assert parameter.grad.abs().max() < 1e-10, key
        else:
            assert relative(parameter.grad, reference) < 1e-8, key
    buffers = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert relative(buffer, buffers[timms(key)]) < 1e-10, key


@pytest.mark.parametrize('name', NAMES)
def test_deploy_form_equals_training_form(name):
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = randomize(Encoder(shallow(name), 8), seed=5).to(dtype).eval()
        x = images(dtype, batch=1)
        with torch.no_grad():
            merged = fastvit_mm.reparameterize(model)
            (features, embeddings), (outs, own) = model(x), merged(x)
        assert relative(own, embeddings) < limit
        for out, feature in zip(outs, features, strict=True):
            assert relative(out, feature) < limit
        left = [n for n, m in merged.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert not left and not any('gamma' in k or 'norm' in k for k in merged.state_dict())


@pytest.mark.parametrize('name', ['mci0', 'hd'])
def test_a_model_that_is_built_merged(name):
    model = randomize(FastViT(shallow(name), feature_norm=True)).eval()
    built = FastViT(shallow(name), feature_norm=True, deploy=True).eval()
    x = images(torch.float32)
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        model.switch_to_deploy()
        built.load_state_dict(model.state_dict(), strict=True)
        for a, b, c in zip(before, model(x), built(x), strict=True):
            assert relative(b, a) < 1e-5
            assert torch.equal(b, c)


def test_the_activation_counts():
    """It has no parameter: only the numbers show it."""
    arch = shallow('mci1')
    with_it = randomize(FastViT(arch)).eval()
    without = FastViT({**arch, 'downsample_act': False}).eval()
    without.load_state_dict(with_it.state_dict(), strict=True)
    x = images(torch.float32)
    with torch.no_grad():
        assert relative(without(x)[1], with_it(x)[1]) > 0.01
    for name in ('t8', 'sa12'):
        act = [type(s.downsample.proj[0].act) for s in FastViT(name).stages[1:]]
        assert act == [nn.Identity] * 3


@pytest.mark.parametrize(
    'args, words',
    [
        (dict(arch='mci0', out_indices=(4,)), ['out_indices', '0, 1, 2, 3']),
        (dict(arch='mci3', out_indices=(5,)), ['out_indices', '0, 1, 2, 3, 4']),
        (dict(arch='hd', frozen_stages=6), ['frozen_stages', '-1 to 5']),
        (dict(arch=dict(depths=(1,) * 5, widths=(8,) * 4)), ['widths', 'five']),
        (dict(arch={**ARCHS['mci0'], 'attention_norm': 'GN'}), ['attention_norm', 'BN or LN']),
        (dict(arch={**ARCHS['mci0'], 'downsample_se': (0, 1)}), ['downsample_se', 'four']),
    ],
)
def test_wrong_arguments(args, words):
    with pytest.raises(FastViTError) as error:
        FastViT(**args)
    assert all(word in str(error.value) for word in words), error.value


# --- configs, embeddings, zero-shot ---------------------------------------------------------------

ROOT = Path(__file__).parent.parent
TASKS = [p for p in sorted(ROOT.glob('configs/*/*.py')) if re.search('_(mci.|hd)_', p.stem)]


def built_on_meta(cfg):
    scope = cfg.default_scope
    registry = __import__(f'{scope}.registry', fromlist=['MODELS']).MODELS
    weights.drop_pretrained(cfg.model)
    cfg.model.backbone.deploy = False  # meta tensors cannot be merged
    with torch.device('meta'), DefaultScope.overwrite_default_scope(scope):
        return registry.build(cfg.model)


@pytest.mark.parametrize('path', TASKS, ids=lambda p: p.stem)
def test_configs(path):
    """Preprocessing, widths, weights; everything else is as in SA12's config."""
    cfg = Config.fromfile(path)
    arch = re.search(r'fastvit_(\w+?)_', path.stem)[1]
    assert cfg.model.backbone.arch == arch
    assert 'for research only' in path.read_text()
    preprocessor = cfg.get('data_preprocessor') or cfg.model.data_preprocessor
    if arch in ('mci3', 'mci4'):
        mean, std = timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD
        assert preprocessor.mean == pytest.approx([255 * m for m in mean], abs=1e-4)
        assert preprocessor.std == pytest.approx([255 * s for s in std], abs=1e-4)
    else:
        assert preprocessor.mean == [0.0] * 3 and preprocessor.std == [255.0] * 3
    widths = list(ARCHS[arch]['widths'])
    assert cfg.model.backbone.get('deploy', False) == (arch == 'hd')
    assert cfg.model.neck.in_channels in (widths[:4], widths[-1])
    model = built_on_meta(cfg)
    assert isinstance(model.backbone, FastViT)
    if path.parent.name in ('detection', 'segmentation'):
        name = path.name.replace(f'_{arch}_', '_sa12_')
        theirs, ours = (flat(Config.fromfile(p).to_dict()) for p in (path.with_name(name), path))
        changed = {k for k in theirs | ours if theirs.get(k) != ours.get(k)}
        parts = 'model.backbone.', 'model.data_preprocessor.', 'model.neck.in_channels'
        assert changed and all(key.startswith(parts) for key in changed)


def flat(node, key=''):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    leaves = {}
    for name, value in items:
        inner = isinstance(value, dict | list | tuple)
        leaves |= flat(value, f'{key}{name}.') if inner else {f'{key}{name}': value}
    return leaves


def photo():
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def embedder(tmp_path_factory):
    """timm's MCi0 as its files are published, and that file."""
    model = randomize(timm.create_model('fastvit_mci0', num_classes=512), seed=4).eval()
    file = tmp_path_factory.mktemp('mci0') / 'mci0.pth'
    torch.save(model.state_dict(), file)
    return model, file


EMBEDDING = ROOT / 'configs/embedding/fastvit_mci0_embedding.py'


def timms_preprocessing(path):
    """timm's, for the weights that a config names."""
    (name,) = set(re.findall(r'fastvit_mci\d\.apple_\w+', path.read_text()))
    known = timm.get_pretrained_cfg(name).to_dict()
    return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=known))


@pytest.mark.parametrize(
    'path',
    [p for p in TASKS if p.parent.name in ('embedding', 'classification')],
    ids=lambda p: p.stem,
)
@pytest.mark.parametrize('size', [(300, 411), (120, 90)])
def test_preprocessing_equals_timms(path, size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        pipeline = Compose(cfg.test_dataloader.dataset.pipeline[1:])
        preprocessor = MODELS.build(cfg.data_preprocessor)
    sample = pipeline(dict(img=image, img_shape=size, ori_shape=size))
    found = preprocessor(pseudo_collate([sample]))['inputs']
    expected = timms_preprocessing(path)(Image.fromarray(image[..., ::-1]))
    assert relative(found[0], expected) < 1e-5


def test_embeddings_equal_timms(embedder, tmp_path):
    """From an image to the vector, through the package's reading and timm's own preprocessing;
    then from exported files, and as JSON."""
    reference, file = embedder
    image = photo()
    prepare = timms_preprocessing(EMBEDDING)
    with torch.no_grad():
        expected = reference(prepare(Image.fromarray(image[..., ::-1]))[None])[0]
    for reparam in (False, True):
        model = fastvit_mm.init_model(EMBEDDING, file, reparam=reparam)
        found = fastvit_mm.inference(model, image)['embedding']
        assert found.shape == (512,)
        assert relative(torch.from_numpy(found), expected) < 1e-4
    export(model, onnx := tmp_path / 'm.onnx', size=(256, 256))
    exported = fastvit_mm.init_model(EMBEDDING, onnx)
    found = fastvit_mm.inference(exported, image)['embedding']
    assert relative(torch.from_numpy(found), expected) < 1e-4
    (record,) = results(dict(embedding=found), {}, 3)
    assert record['image_id'] == 3 and record['embedding'] == found.tolist()


def texts_file(path, embeddings, names):
    metadata = dict(names=json.dumps(names))
    safetensors.save_file(dict(embeddings=embeddings), path, metadata=metadata)
    return str(path)


def test_zero_shot(embedder, tmp_path):
    _, file = embedder
    image = photo()
    names = ['a cat', 'a dog', 'noise']
    texts = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    path = texts_file(tmp_path / 'texts.safetensors', texts, names)
    options = {'model.head.texts': path}
    model = fastvit_mm.init_model(EMBEDDING, file, cfg_options=options)
    vector = fastvit_mm.inference(fastvit_mm.init_model(EMBEDDING, file), image)['embedding']
    cosines = nn.functional.cosine_similarity(torch.from_numpy(vector)[None], texts)
    expected = (100 * cosines).softmax(0)
    found = fastvit_mm.inference(model, image)
    assert found['pred_scores'] == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-6)
    assert found['pred_class'] == names[int(expected.argmax())]
    export(model, onnx := tmp_path / 'm.onnx', size=(256, 256))
    exported = fastvit_mm.init_model(EMBEDDING, onnx, cfg_options=options)
    again = fastvit_mm.inference(exported, image)
    assert again['pred_scores'] == pytest.approx(found['pred_scores'], rel=1e-3, abs=1e-6)
    assert again['pred_class'] == found['pred_class']


def test_files_of_texts_that_do_not_fit(tmp_path):
    two = torch.ones(2, 8)
    cases = {
        'names': texts_file(tmp_path / 'names.safetensors', two, ['one']),
        'flat': texts_file(tmp_path / 'flat.safetensors', torch.ones(2), ['a', 'b']),
        'nan': texts_file(tmp_path / 'nan.safetensors', two / 0 * 0, ['a', 'b']),
    }
    bare = tmp_path / 'bare.safetensors'
    safetensors.save_file(dict(embeddings=two), bare)
    for path, word in (
        (cases['names'], 'a vector for each name'),
        (cases['flat'], 'a vector for each name'),
        (cases['nan'], 'NaN'),
        (bare, 'names'),
        (tmp_path / 'none.safetensors', 'do not exist'),
    ):
        with pytest.raises(FastViTError, match=word):
            ZeroShotHead(path)
    head = ZeroShotHead(texts_file(tmp_path / 'ok.safetensors', two, ['a', 'b']))
    with pytest.raises(FastViTError, match='embeddings of 8, the images of 4'):
        head((torch.ones(1, 4),))
    with pytest.raises(FastViTError, match='nothing to train'):
        head.loss((torch.ones(1, 8),), [])


def test_a_frozen_neck():
    """Linear probing: neither weights nor statistics of the last block change."""
    neck = FastViTNeck(8, frozen=True).train()
    before = {k: v.clone() for k, v in neck.state_dict().items()}
    neck((torch.randn(2, 8, 4, 4),))
    assert not any(p.requires_grad for p in neck.parameters())
    assert all(torch.equal(v, before[k]) for k, v in neck.state_dict().items())
    neck.switch_to_deploy()
    assert not any(p.requires_grad for p in neck.parameters())
    other = FastViTNeck(8, projection=4)
    assert all(p.requires_grad for p in other.parameters())
    other.projection.requires_grad_(False)
    other.switch_to_deploy()
    assert not any(p.requires_grad for p in other.projection.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('format', FORMATS)
def test_every_format(format, tmp_path):
    """Squeeze-and-excite, GELU and LayerNorm, five stages: the file gives the network's numbers."""
    arch = {**shallow('mci3'), 'widths': (32, 64, 64, 128, 128), 'downsample_se': (0, 0, 1, 1, 0)}
    cfg = Config.fromfile(EMBEDDING)
    cfg.model.backbone = dict(type='FastViT', arch=arch, out_indices=(4,))
    cfg.model.neck = dict(type='FastViTNeck', in_channels=128, projection=16)
    model = randomize(fastvit_mm.init_model(cfg))
    path = tmp_path / f'model{FORMATS[format].suffix}'
    if not all(map(find_spec, FORMATS[format].needs)):
        pytest.skip(f'needs {FORMATS[format].needs}')
    info = export(model, path, format, size=(96, 64), preprocess=True)
    assert info['task'] == 'embedder' and info['outputs'] == ['embeddings']
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    assert verify(model, path, [noise]).explained
    other = randomize(fastvit_mm.init_model(cfg), seed=1)
    assert not verify(other, path, [noise]).explained


def test_the_commands(embedder, tmp_path, capfd):
    """From timm's file to an exported one, and to embeddings of a folder of images."""
    from fastvit_mm.cli import export as export_command
    from fastvit_mm.cli import infer

    _, file = embedder
    (folder := tmp_path / 'photos').mkdir()
    Image.fromarray(photo()).save(folder / 'a.png')
    config, onnx, out = str(EMBEDDING), str(tmp_path / 'm.onnx'), tmp_path / 'out'
    export_command.main([config, str(file), '--out', onnx])
    assert 'gives  embeddings' in capfd.readouterr().out
    vectors = []
    for source in (str(file), onnx):
        infer.main([config, source, str(folder), '--out', str(out), '--json'])
        assert f'1 embeddings in {out}' in capfd.readouterr().out
        (record,) = json.loads((out / 'photos.predictions.json').read_text())
        vectors.append(torch.tensor(record['embedding']))
    assert vectors[0].shape == (512,) and relative(vectors[1], vectors[0]) < 1e-4
    assert {p.suffix for p in out.iterdir()} == {'.json'}
    command = [config, str(file), str(folder), '--out', str(out)]
    with pytest.raises(FastViTError, match='add --json'):
        infer.main(command)
    with pytest.raises(FastViTError, match=r'--cam is for a class, .* model\.head\.texts=FILE'):
        infer.main([*command, '--cam', '3'])


@pytest.fixture
def tested(embedder, tmp_path, monkeypatch):
    """Zero-shot top-1 in percent of two images, each of which is its own class, with texts of
    the given names."""
    from fastvit_mm.cli import test

    _, file = embedder
    monkeypatch.chdir(tmp_path)
    model = fastvit_mm.init_model(EMBEDDING, file)
    noise, vectors = np.random.default_rng(5), {}
    for name in ('cat', 'dog'):
        image = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8) // (1 + (name == 'dog'))
        (folder := tmp_path / 'photos' / name).mkdir(parents=True)
        Image.fromarray(image[..., ::-1]).save(folder / 'a.png')
        vectors[name] = torch.from_numpy(fastvit_mm.inference(model, image)['embedding'])
    (config := tmp_path / 'own.py').write_text(
        f'_base_ = {str(EMBEDDING)!r}\n'
        "dataset = dict(_delete_=True, type='CustomDataset', data_root='photos', "
        'pipeline=_base_.test_pipeline)\n'
        'test_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset)\n'
        'test_evaluator = dict(topk=(1,))\n'
    )

    def call(names=None, of=None, exported=False):
        options, source = [], file
        if names:
            embeddings = torch.stack([vectors[name] for name in of or names])
            texts = texts_file(tmp_path / 'texts.safetensors', embeddings, list(names))
            options = ['--cfg-options', f'model.head.texts={texts}']
            if exported:
                model = fastvit_mm.init_model(config, file, cfg_options={'model.head.texts': texts})
                export(model, source := tmp_path / 'm.onnx', size=(256, 256))
        out = tmp_path / 'metrics.json'
        test.main([str(config), str(source), '--out', str(out), *options])
        (value,) = json.loads(out.read_text()).values()
        return value

    return call


@pytest.mark.slow
def test_a_test_follows_the_names(tested, capfd):
    """Labels of a data set are numbers; the names of the texts say which is which."""
    assert tested(('cat', 'dog')) == 100
    assert 'another order' not in capfd.readouterr().err
    assert tested(('dog', 'cat')) == tested(('dog', 'cat'), exported=True) == 100
    said = capfd.readouterr()
    assert 'in another order' in said.out + said.err
    assert tested(('a cat', 'a dog'), of=('cat', 'dog')) == 100
    said = capfd.readouterr()
    assert 'taken in their order' in said.out + said.err
    for names, of, words in (
        (('cat', 'dog', 'bird'), ('cat', 'dog', 'dog'), '3 texts for the 2 classes'),
        (('dog', 'bird'), ('dog', 'cat'), "'dog' is where the data set has 'cat'"),
        (None, None, 'model.head.texts=FILE'),
    ):
        with pytest.raises(FastViTError, match=words):
            tested(names, of)


def test_orders_of_names():
    assert order_of('cab', 'abc') == [1, 2, 0]
    assert order_of(['x', 'y'], ['a', 'b']) == [0, 1]
    # ImageNet has 'missile' and 'projectile, missile', which others call missile, too
    assert order_of(['m', 'm', 'x'], ['m', 'p, m', 'a']) == [0, 1, 2]
    for names in ('aab', 'xab', 'ab'):
        with pytest.raises(FastViTError, match='make a file of texts'):
            order_of(names, 'abc')
    with pytest.raises(FastViTError, match="'b' is where the data set has 'c'"):
        order_of('aab', 'abc')


def test_a_sheet_without_training_images(capfd):
    from fastvit_mm.cli import check

    with pytest.raises(FastViTError, match='train_dataloader'):
        check.main([str(EMBEDDING), '--show', 'sheet.png'])
