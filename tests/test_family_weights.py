"""The files of MobileCLIP, OpenCLIP, timm and FastVLM: their names and shapes, random values."""

import hashlib
import json
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
from randomize import randomize, relative
from test_convert_weights import convert, done, tensors  # noqa: F401  (a fixture)
from test_weights import says
from timm.models.fastvit import checkpoint_filter_fn

from fastvit_mm import ARCHS, FastViT, FastViTNeck, weights
from fastvit_mm.models.archs import parse_arch
from fastvit_mm.weights import encoders, loading

safetensors = pytest.importorskip('safetensors.torch')
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
# Three quarters of MCi0's blocks and most of FastViTHD's weights would only take time here.
SMALL = dict(depths=(1, 1, 1, 1), widths=(32, 64, 128, 256))
SMALL_HD = dict(depths=(1,) * 5, widths=(32, 64, 128, 256, 512))


@pytest.fixture
def said(monkeypatch):
    """What is logged, in one string."""
    lines = []
    for module in (encoders, loading):
        monkeypatch.setattr(module, 'print_log', lambda line, *_: lines.append(line))
    encoders.say_licence.cache_clear()

    def call():
        text = ' | '.join(lines)
        lines.clear()
        return text

    return call


class Encoder(nn.Module):
    """What the configs build, without mmpretrain: stage outputs and embeddings."""

    def __init__(self, arch, projection=8, deploy=False):
        super().__init__()
        widths = parse_arch(arch)['widths']
        every = tuple(range(len(widths)))
        self.backbone = FastViT(arch, out_indices=every, deploy=deploy)
        self.neck = FastViTNeck(widths[-1], projection=projection, deploy=deploy)

    def forward(self, x):
        outs = self.backbone(x)
        return (*outs, self.neck(outs)[0])


def timms(name, small, **args):
    """timm's encoder with random weights and statistics."""
    arch = dict(layers=small['depths'], embed_dims=small['widths'])
    model = timm.create_model(f'fastvit_{name}', num_classes=8, **arch, **args)
    return randomize(model, seed=4).eval()


@torch.no_grad()
def outputs(model):
    if isinstance(model, Encoder):
        return model.eval()(IMAGES)
    last, features = model.forward_intermediates(IMAGES)
    head = model.head.fc.in_features
    return (*features, model.forward_head(last)) if head else features


def agree(model, reference, limit=1e-5):
    for a, b in zip(outputs(model), outputs(reference), strict=True):
        assert relative(a, b) < limit


TOWER = {'layers.0.weight': torch.ones(3, 3), 'positional_embedding': torch.ones(2)}


def mobileclip(model, path):
    state = {f'image_encoder.model.{k}': v for k, v in authors(model.state_dict()).items()}
    state |= {f'text_encoder.{k}': v for k, v in TOWER.items()} | {'logit_scale': torch.ones(())}
    torch.save(state, path := path.with_suffix('.pt'))
    return path


def openclip(model, path):
    state = {f'visual.trunk.{k}': v for k, v in model.state_dict().items()}
    state |= {f'text.{k}': v for k, v in TOWER.items()} | {'logit_scale': torch.ones(())}
    safetensors.save_file(state, path := path.with_suffix('.safetensors'))
    return path


def mobileclip2(model, path):
    """As a training script in parallel saves it."""
    state = {f'module.visual.trunk.{k}': v for k, v in model.state_dict().items()}
    state |= {f'module.text.{k}': v for k, v in TOWER.items()}
    torch.save(dict(state_dict=state, epoch=3), path := path.with_suffix('.pt'))
    return path


def fastvlm(model, folder, tower=TOWER):
    """In two parts with an index; without a head; the numbers are half precision's."""
    state = {k: v for k, v in authors(model.state_dict()).items() if not k.startswith('head')}
    state = {f'model.vision_tower.vision_tower.model.{k}': v for k, v in state.items()}
    others = {f'model.{k}': v for k, v in tower.items()} | {'lm_head.weight': torch.ones(2)}
    names = sorted(state)
    half = len(names) // 2
    parts = {
        'model-00001-of-00002.safetensors': {k: state[k] for k in names[:half]} | others,
        'model-00002-of-00002.safetensors': {k: state[k] for k in names[half:]},
    }
    folder.mkdir()
    for name, part in parts.items():
        safetensors.save_file(part, folder / name)
    index = dict(weight_map={k: name for name, part in parts.items() for k in part})
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return folder


def authors(state):
    """timm's names as the authors write them: by our own converter, which the digests check."""
    state = weights.timm_to_authors(state)
    if 'head.weight' in state:
        state['head.proj'] = state.pop('head.weight').T.contiguous()
        del state['head.bias']
    return state


# sha256 of the sorted lines 'name [shape]', from the published files
DIGESTS = {
    'mci0': '0ae3e05ed8179a7c187a20698792bd18bd7dc2e5a04fbd1642507e42e3d59e50',
    'hd': '0a50bef2444b64b6f947edf5173cfd0f78c0506ade2c0887e7422a8f96406802',
}


@pytest.mark.parametrize('name', DIGESTS)
def test_the_authors_names(name):
    """At full size: what our converter makes of timm's names is what Apple publishes."""
    with torch.device('meta'):
        theirs = timm.create_model(
            'fastvit_mci3' if name == 'hd' else 'fastvit_mci0',
            num_classes=0 if name == 'hd' else 512,
            inference_mode=name == 'hd',
        )
    state = authors(theirs.state_dict())
    lines = sorted(f'{k} {list(v.shape)}' for k, v in state.items())
    assert hashlib.sha256('\n'.join(lines).encode()).hexdigest() == DIGESTS[name]


@pytest.mark.parametrize('layout', [mobileclip, openclip, mobileclip2])
def test_files_with_a_text_tower(layout, tmp_path, convert, said):  # noqa: F811
    reference = timms('mci0', SMALL)
    if layout is mobileclip:
        nn.init.zeros_(reference.head.fc.bias)  # which it does not have
    file = layout(reference, tmp_path / 'clip')
    arch = {**parse_arch('mci0'), **SMALL}
    if layout is mobileclip:  # as timm itself reads the file
        twin = timms('mci0', SMALL)
        read = checkpoint_filter_fn(torch.load(file, weights_only=True), twin)
        twin.load_state_dict(read, strict=True)
        assert all(
            torch.equal(a, b) for a, b in zip(outputs(twin), outputs(reference), strict=True)
        )

    weights.load(model := Encoder(arch), file, whole=True)
    agree(model, reference)
    text = said()
    assert text.count('left out: ') == 1 and 'text' in text and 'tensors' in text
    assert text.count('research only') == 1
    weights.load(merged := Encoder(arch, deploy=True), file, whole=True)
    agree(merged, reference)
    assert 'research only' not in said()

    backbone = FastViT(arch, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    backbone.init_weights()
    assert all(
        torch.equal(a, b)
        for a, b in zip(backbone.eval()(IMAGES), model.backbone(IMAGES), strict=True)
    )

    done(convert(file, mm := tmp_path / 'mm.pth'))
    assert set(tensors(mm)) == set(model.state_dict())
    weights.load(again := Encoder(arch), mm, whole=True)
    agree(again, reference)
    done(convert(mm, back := tmp_path / 'timm.pth', '--to', 'timm'))
    for key, value in reference.state_dict().items():
        assert torch.equal(tensors(back)[key], value), key
    code, err = convert(mm, back := tmp_path / 'apple.pth', '--to', 'apple')
    if layout is mobileclip:
        assert tensors(back).keys() == authors(reference.state_dict()).keys()
    else:
        assert code == 2 and 'no bias in its projection' in err and not back.exists()
    done(convert(file, merged_file := tmp_path / 'm.pth', '--deploy'))
    weights.load(merged, merged_file, whole=True)
    agree(merged, reference)


class Classifier(Encoder):
    """Which has as many classes as an embedding has numbers."""

    def __init__(self, arch='mci0', classes=512, deploy=False):
        super().__init__(arch, None, deploy)
        self.head = nn.ModuleDict(dict(fc=nn.Linear(2 * parse_arch(arch)['widths'][-1], classes)))


@pytest.mark.slow
def test_timms_files(tmp_path, said):
    """Nothing but the arch and the width says that its head is a projection."""
    reference = randomize(timm.create_model('fastvit_mci0', num_classes=512), seed=4).eval()
    assert reference.head.fc.bias.any()
    safetensors.save_file(reference.state_dict(), file := tmp_path / 'm.safetensors')
    weights.load(model := Encoder('mci0', 512), file, whole=True)
    agree(model, reference)
    assert said() == encoders.LICENCE
    clip = mobileclip2(reference, tmp_path / 'clip')
    for source, prefix in ((file, None), (clip, None), (clip, 'visual.trunk')):
        weights.load(again := Encoder('mci0', 512), source, whole=True, prefix=prefix)
        agree(again, reference)
    # a classifier, in either form, begins with its own head, and says so
    for deploy, source in ((True, file), (False, clip)):
        head = (other := Classifier(deploy=deploy)).head['fc'].weight.clone()
        said()
        weights.load(other, source)
        text = said()
        assert torch.equal(other.head['fc'].weight, head)
        assert 'newly initialized: head.fc.bias, head.fc.weight' in text
        assert 'left out: neck.projection.bias, neck.projection.weight' in text
        assert relative(outputs(other)[3], outputs(model)[3]) < 1e-5
    says(lambda: weights.load(other, file, whole=True), 'neck.projection.weight')
    # and one of other classes remains a classifier
    randomize(reference := timm.create_model('fastvit_mci0', num_classes=8), seed=5)
    torch.save(reference.state_dict(), classifier := tmp_path / 'classifier.pth')
    weights.load(other := Classifier(classes=8), classifier, whole=True)
    assert torch.equal(other.head['fc'].weight, reference.head.fc.weight)
    says(lambda: weights.load(model, classifier), 'MCi0', 'neck.projection.weight')


@pytest.mark.slow
def test_the_licence_is_said(tmp_path, said):
    """Once, however the weights come; not of one's own models, nor of other networks."""

    def licence(call):
        encoders.say_licence.cache_clear()
        said()
        call()
        return said().count('research only')

    reference = timm.create_model('fastvit_mci0', num_classes=8)
    model, files = FastViT('mci0'), {}
    for name, state in (
        ('biased', reference.state_dict()),
        ('headless', {k: v for k, v in reference.state_dict().items() if 'head.' not in k}),
        ('trunk', {f'visual.trunk.{k}': v for k, v in reference.state_dict().items()}),
        ('t8', timm.create_model('fastvit_t8').state_dict()),
        ('own', Classifier(classes=8).state_dict()),
        ('fresh', FastViT('mci0').state_dict()),
    ):
        safetensors.save_file(state, path := tmp_path / f'{name}.safetensors')
        files[name] = path
    for name in ('biased', 'headless'):
        assert licence(lambda name=name: weights.load(model, files[name])) == 1, name
    assert licence(lambda: weights.load(model, files['trunk'], prefix='visual.trunk')) == 1
    converted = tmp_path / 'mm.pth'
    assert licence(lambda: weights.convert_file(files['headless'], converted)) == 1
    assert licence(lambda: weights.load(model, converted)) == 1
    assert licence(lambda: weights.load(FastViT('t8'), files['t8'])) == 0
    for name in ('own', 'fresh'):
        assert licence(lambda name=name: weights.load(model, files[name])) == 0, name


def test_fastvlm(tmp_path, monkeypatch, convert, said):  # noqa: F811
    monkeypatch.setitem(ARCHS, 'hd', {**ARCHS['hd'], **SMALL_HD})
    reference = timms('mci3', SMALL_HD, inference_mode=True)
    folder = fastvlm(reference, tmp_path / 'vlm')
    expected = outputs(reference)[:5]

    def check(backbone):
        for a, b in zip(backbone.eval()(IMAGES), expected, strict=True):
            assert relative(a, b) < 1e-5

    every = tuple(range(5))
    merged = FastViT('hd', out_indices=every, deploy=True)
    for source in (folder, folder / 'model.safetensors.index.json'):
        weights.load(merged, source)
        check(merged)
    assert 'lm_head' in (text := said()) and 'without branches' not in text
    # a model with branches loses them, and says so
    weights.load(model := FastViT('hd', out_indices=every), folder)
    check(model)
    assert set(model.state_dict()) == set(merged.state_dict())
    assert 'without branches' in said()
    model.train()(IMAGES)[0].square().mean().backward()
    assert model.stem[0].reparam_conv.weight.grad is not None
    # but not behind the back of an optimizer
    init = dict(type='Pretrained', checkpoint=str(folder))
    fresh = FastViT('hd', out_indices=every, init_cfg=init)
    says(fresh.init_weights, 'deploy=True', 'without branches')
    ready = FastViT('hd', out_indices=every, deploy=True, init_cfg=init)
    ready.init_weights()
    check(ready)
    # nor where the arch is one that is published with branches
    arch = parse_arch('hd')
    says(lambda: weights.load(FastViT(arch, out_indices=every), folder), 'deploy=True')

    done(convert(folder, mm := tmp_path / 'mm.pth', '--deploy'))
    weights.load(again := FastViT('hd', out_indices=every, deploy=True), mm)
    check(again)
    code, err = convert(folder, tmp_path / 'no.pth')
    assert code == 2 and 'deploy form' in err

    (folder / 'model-00002-of-00002.safetensors').unlink()
    says(lambda: weights.load(merged, folder), 'model-00002', 'not in its folder')
    (folder / 'model.safetensors.index.json').write_text('{"weight_map": 3}')
    says(lambda: weights.load(merged, folder), 'not an index')


def test_half_precision_is_merged_in_the_models(tmp_path):
    """FastVLM's weights are bfloat16: a merge rounded to it would cost two digits."""
    reference = timms('mci3', SMALL_HD, inference_mode=True).bfloat16()
    folder = fastvlm(reference, tmp_path / 'vlm')
    arch = {**parse_arch('hd'), **SMALL_HD}
    weights.load(model := FastViT(arch, out_indices=tuple(range(5)), deploy=True), folder)
    with torch.no_grad():
        outs = model.eval()(IMAGES)
    for a, b in zip(outs, outputs(reference.float()), strict=False):
        assert relative(a, b) < 1e-5


def test_what_is_not_known_beside_an_encoder(tmp_path):
    reference = timms('mci0', SMALL)
    state = {f'visual.trunk.{k}': v for k, v in reference.state_dict().items()}
    torch.save({**state, 'visual.head.proj.weight': torch.ones(2, 2)}, file := tmp_path / 'a.pt')
    model = Encoder({**parse_arch('mci0'), **SMALL})
    says(lambda: weights.load(model, file), 'visual.head.proj.weight', "prefix='visual.trunk'")
    weights.load(model.backbone, file, prefix='visual.trunk')
    x = outputs(reference)[3]
    assert relative(model.backbone.eval()(IMAGES)[3], x) < 1e-5


def test_the_wrong_activation(tmp_path):
    """The stem and first stage of T12 are also MCi0's, by name; a whole MCi0 without activation
    fits by all names."""
    torch.save(timm.create_model('fastvit_t12').state_dict(), t12 := tmp_path / 't12.pth')
    says(
        lambda: weights.load(FastViT('mci0', out_indices=(0,)), t12),
        'FastViT-T12',
        'no activation',
        'another function',
    )
    says(lambda: weights.load(FastViT('mci0'), t12), 'FastViT-T12', 'MCi0')
    torch.save(timm.create_model('fastvit_mci0').state_dict(), mci0 := tmp_path / 'mci0.pth')
    plain = {**parse_arch('mci0'), 'downsample_act': False}
    says(lambda: weights.load(FastViT(plain), mci0), 'this is MCi0', 'an activation')
    # a user's own network, of which this is the checkpoint, is none of the known
    own = FastViT(plain)
    torch.save(own.state_dict(), file := tmp_path / 'own.pth')
    weights.load(FastViT(plain), file)
    says(lambda: weights.load(FastViT('sa12', out_indices=(0,)), mci0), 'does not fit')


def test_short_names(monkeypatch, tmp_path, said):
    def offline(address, path):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    apple, hub = 'docs-assets.developer.apple.com', 'huggingface.co/timm/'
    for name, address, suffix in (
        (
            'fastvit_mci0.apple_mclip',
            f'{apple}/ml-research/datasets/mobileclip/mobileclip_s0.pt',
            '.pt',
        ),
        ('fastvit_mci2.apple_mclip', 'mobileclip_s2.pt', '.pt'),
        *(
            (f'fastvit_mci{i}.apple_mclip2_dfndr2b', f'{hub}fastvit_mci{i}.', '.safetensors')
            for i in (0, 2, 3, 4)
        ),
    ):
        encoders.say_licence.cache_clear()
        says(lambda name=name: weights.find(name), address, f'checkpoints/{name}{suffix}')
        assert 'research only' in said()
    for name in ('fastvit_mci3.apple_mclip', 'fastvit_mci0.apple_in1k', 'fastvit_t8.apple_mclip'):
        says(lambda name=name: weights.find(name), 'does not exist', 'apple_mclip2_dfndr2b')


MEMORY = """
import resource, sys, torch
from fastvit_mm import FastViT, weights
model = FastViT(eval(sys.argv[2]), out_indices=(0, 1, 2, 3, 4), deploy=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights.load(model, sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='ru_maxrss in KiB')
def test_memory_of_a_language_model(tmp_path):
    """It is beside the encoder, in the same part, and is never read."""
    tower = {'layers.0.weight': torch.zeros(100_000_000)}  # 400 MB
    folder = fastvlm(timms('mci3', SMALL_HD, inference_mode=True), tmp_path / 'vlm', tower)
    run = subprocess.run(
        [sys.executable, '-c', MEMORY, str(folder), repr({**parse_arch('hd'), **SMALL_HD})],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-500:]
    grown = int(run.stdout.split()[-1]) // 1000
    assert grown < 200, f'{grown} MB'  # the encoder has 27
