"""No weights file runs code, whoever reads it; and files that lie elsewhere."""

import argparse
import http.server
import multiprocessing
import pickle
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.model import BaseModel, BaseModule, PretrainedInit
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader, Runner, checkpoint, load_checkpoint
from test_weights import Hostile, build, says

from fastvit_mm import FastViT, FastViTError, launch, weights
from fastvit_mm.weights import engine

ARCH = dict(depths=(1, 1, 1, 1), widths=(16, 16, 32, 32), ffn_ratio=2)


class Plain(BaseModule):
    """A module without a FastViT: a teacher, a ResNet."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.fc = nn.Linear(2, 3)


class Regressor(BaseModel):
    def __init__(self, backbone=False):
        super().__init__()
        self.backbone = FastViT(ARCH) if backbone else nn.Identity()
        self.head = nn.Conv2d(32 if backbone else 3, 1, 1)

    def forward(self, inputs, mode='tensor'):
        x = self.backbone(torch.stack(list(inputs)))
        out = self.head(x[-1] if isinstance(x, tuple) else x)
        return dict(loss=F.mse_loss(out, torch.ones_like(out))) if mode == 'loss' else out


def runner(folder, model, kind=Runner, steps=1, **args):
    return kind(
        model,
        str(folder),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.ones(3, 32, 32))] * 4,
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=steps),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)),
        **args,
    )


@pytest.fixture
def trap(tmp_path):
    return tmp_path / 'trap'


@pytest.fixture
def hostile(trap, tmp_path):
    """Weights that fit :class:`Plain`, with what runs code when it is unpickled."""
    file = tmp_path / 'hostile.pth'
    torch.save(dict(state_dict=Plain().state_dict(), meta=Hostile(trap)), file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    return file


def pretrained(file, **args):
    return dict(type='Pretrained', checkpoint=str(file), **args)


def teach(file):
    import fastvit_mm.models.distillation  # noqa: F401  (registers it)

    if 'Plain' not in MODELS:
        MODELS.register_module(name='Plain', module=Plain)
    model = dict(
        type='DistilledImageClassifier',
        backbone=dict(type='FastViT', arch=ARCH, out_indices=(3,)),
        teacher=dict(type='mmengine.Plain', init_cfg=pretrained(file)),
    )
    build('mmpretrain', model)


ROUTES = {
    'load_checkpoint': lambda file, _: load_checkpoint(Plain(), str(file)),
    'CheckpointLoader': lambda file, _: CheckpointLoader.load_checkpoint(str(file)),
    'load_from_local': lambda file, _: checkpoint.load_from_local(str(file), 'cpu'),
    'with_prefix': lambda file, _: checkpoint._load_checkpoint_with_prefix('fc', str(file)),
    'init_cfg': lambda file, _: Plain(pretrained(file)).init_weights(),
    'init_cfg, prefix': lambda file, _: Plain(pretrained(file, prefix='fc')).init_weights(),
    'init_cfg, FastViT': lambda file, _: FastViT('t8', init_cfg=pretrained(file)).init_weights(),
    'teacher': lambda file, _: teach(file),
    'load': lambda file, _: weights.load(Plain(), file),
    'load_from': lambda file, folder: runner(folder, Regressor(), load_from=str(file)).train(),
    'resume': lambda file, folder: runner(folder, Regressor()).resume(str(file)),
    'our runner': lambda file, folder: runner(folder, Regressor(), launch.Runner).resume(str(file)),
}


@pytest.mark.parametrize('route', ROUTES)
def test_no_route_runs_code(route, hostile, trap, tmp_path):
    with pytest.raises(FastViTError, match=r'open.*refused'):
        ROUTES[route](hostile, tmp_path)
    assert not trap.exists()
    # and a plain pickle
    hostile.write_bytes(pickle.dumps(Hostile(trap)))
    with pytest.raises(FastViTError):
        ROUTES[route](hostile, tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize('kind', [Runner, launch.Runner])
@pytest.mark.parametrize('backbone', [False, True])
def test_a_config_inside_a_checkpoint_is_not_run(kind, backbone, trap, tmp_path):
    """mmengine's ``resume`` takes ``meta['config']`` as Python; the rest of meta stays."""
    runner(tmp_path / 'first', Regressor(backbone)).train()
    saved = weights.read(tmp_path / 'first' / 'iter_1.pth')
    saved['meta'] |= dict(config=f'open({str(trap)!r}, "w")\n', dataset_meta=dict(classes=['a']))
    torch.save(saved, file := tmp_path / 'resumed.pth')
    again = runner(tmp_path / 'again', Regressor(backbone), kind, 2)
    again.call_hook = lambda name, checkpoint=None, **_: seen.append(checkpoint)
    seen = []
    again.resume(str(file))
    assert not trap.exists()
    assert again.iter == 1
    assert seen[0]['meta'] == {k: v for k, v in saved['meta'].items() if k != 'config'}
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, saved['state_dict'][key])


def test_meta_is_a_dict_or_nothing(tmp_path):
    """Other types could answer as a dict does, and have a config."""
    for meta in (argparse.Namespace(config='1/0'), ['config'], None):
        torch.save(dict(state_dict=Plain().state_dict(), meta=meta), file := tmp_path / 'a.pth')
        assert set(weights.read(file)) == {'state_dict'}
        assert weights.prepare(Plain(), file)['meta'] == {}
    torch.save(dict(meta=torch.ones(1)), file)  # a parameter of that name
    assert weights.read(file)['meta'] == 1
    torch.save([1], file)
    says(lambda: weights.read(file), 'no weights', 'list')


def fetched(monkeypatch, hostile):
    """Every download gives the hostile file; returns the addresses asked for."""
    addresses = []

    def download(address, path):
        addresses.append(address)
        Path(path).write_bytes(hostile.read_bytes())

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(hostile.parent / 'hub'))
    return addresses


def test_no_scheme_runs_code(hostile, trap, monkeypatch, tmp_path):
    """Every kind of address that mmengine knows."""
    (tmp_path / 'open_mmlab.json').write_text('{"mine": "hostile.pth"}')
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    petrel(monkeypatch, lambda _: hostile.read_bytes())
    addresses = fetched(monkeypatch, hostile)
    tried = {
        str(hostile): '',
        'http://a/b.pth': 'http://',
        'https://a/b.pth': 'https://',
        's3://a/b.pth': r'(\S+\:)?s3://',
        'cluster:s3://a/b.pth': r'(\S+\:)?s3://',
        'petrel://a/b.pth': r'(\S+\:)?petrel://',
        'torchvision://resnet18': 'torchvision://',
        'modelzoo://resnet18': 'modelzoo://',
        'open-mmlab://mine': 'open-mmlab://',
        'openmmlab://mine': 'openmmlab://',
        'open-mmlab://detectron2/resnet50_caffe': 'open-mmlab://',
        'mmcls://resnet50_v1d': 'mmcls://',
    }
    for address in tried:
        with pytest.raises(FastViTError, match='refused'):
            load_checkpoint(Plain(), address)
        assert not trap.exists()
    assert len(addresses) == 5  # resnet18 once: it is kept
    with pytest.raises(FastViTError, match='pavi'):
        load_checkpoint(Plain(), 'pavi://a')
    with pytest.raises(FastViTError, match='no weights of this name'):
        load_checkpoint(Plain(), 'open-mmlab://nothing')
    assert {*tried.values(), 'pavi://'} == set(CheckpointLoader._schemes)


def test_mmengine_still_loads(tmp_path):
    torch.save(dict(state_dict=(source := Plain()).state_dict()), file := tmp_path / 'a.pth')
    for load in (
        lambda model: load_checkpoint(model, str(file), map_location='cpu'),
        lambda model: weights.load(model, file),
        lambda model: WEIGHT_INITIALIZERS.build(pretrained(file))(model),
    ):
        load(model := Plain())
        assert torch.equal(model.fc.weight, source.fc.weight)
    assert checkpoint.load_from_local(str(file), torch.device('meta'))['state_dict'][
        'fc.bias'
    ].is_meta


def test_installed_once_or_twice(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    CheckpointLoader.register_scheme('mine://', lambda *_: 'mine', force=True)
    before = dict(CheckpointLoader._schemes)
    weights.install()
    assert before == CheckpointLoader._schemes  # what others registered stays
    assert PretrainedInit.__call__ is engine.initialize and engine.lenient is not engine.initialize


# ------------------------------------------------------------------------------ files elsewhere


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder, slowly, and counts; TORCH_HOME is a new one."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    (tmp_path / 'served').mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        asked = []

        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / 'served'))

        def do_GET(self):
            self.asked.append(self.path)
            time.sleep(0.5)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(
            address=f'http://127.0.0.1:{serving.server_port}',
            folder=tmp_path / 'served',
            asked=Handler.asked,
        )
        serving.shutdown()


def rank(address):
    try:
        return str(weights.find(address))
    except FastViTError as error:
        return error


def ranks(address, n=4):
    with multiprocessing.get_context('fork').Pool(n) as pool:
        return pool.map_async(rank, [address] * n, chunksize=1).get(timeout=60)


def test_one_rank_fetches(server, tmp_path):
    """The others wait, and all have the whole file."""
    torch.save(dict(state_dict=Plain().state_dict()), server.folder / 'a.pth')
    found = set(ranks(f'{server.address}/a.pth'))
    assert server.asked == ['/a.pth']
    (path,) = map(Path, found)
    assert path.is_relative_to(tmp_path / 'torch')
    assert path.read_bytes() == (server.folder / 'a.pth').read_bytes()
    assert {p.suffix for p in path.parent.iterdir()} == {'.pth', '.lock'}


def test_no_rank_waits_for_a_failed_download(server):
    errors = ranks(f'{server.address}/no.pth')
    assert len(errors) == 4
    for error in errors:
        says(lambda error=error: (_ for _ in ()).throw(error), 'cannot fetch', 'no.pth', '404')


def test_two_addresses_are_two_files(server):
    """torch.hub knows a file by the last part of its address alone."""
    for run, bias in (('a', 1.0), ('b', 2.0)):
        (server.folder / run).mkdir()
        torch.save(dict(bias=torch.tensor(bias)), server.folder / run / 'best.pth')
    read = [weights.read(f'{server.address}/{run}/best.pth')['bias'] for run in 'aba']
    assert read == [1, 2, 1]
    assert len(server.asked) == 2
    # names that end in a hash are shared with torch.hub, as ever
    torch.save({}, server.folder / 'a-0123abcd.pth')
    path = weights.find(f'{server.address}/a-0123abcd.pth')
    assert path == Path(torch.hub.get_dir(), 'checkpoints', 'a-0123abcd.pth')


def petrel(monkeypatch, get):
    """mmengine's own backend for ``s3://``, with a client that answers with ``get``."""
    client = types.ModuleType('petrel_client.client')
    client.Client = lambda **_: types.SimpleNamespace(Get=get)
    package = types.ModuleType('petrel_client')
    package.client = client
    monkeypatch.setitem(sys.modules, 'petrel_client', package)
    monkeypatch.setitem(sys.modules, 'petrel_client.client', client)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_file_client(suffix, monkeypatch, tmp_path):
    source = FastViT(ARCH)
    weights.save(dict(state_dict=source.state_dict()), file := tmp_path / f'a{suffix}')
    address = f's3://bucket/a{suffix}'
    petrel(monkeypatch, {address: file.read_bytes()}.get)
    assert weights.find(address) == address
    for load in (
        lambda model: weights.load(model, address),
        lambda model: load_checkpoint(model, address),
        lambda model: WEIGHT_INITIALIZERS.build(pretrained(address))(model),
    ):
        load(model := FastViT(ARCH))
        for key, value in model.state_dict().items():
            assert torch.equal(value, source.state_dict()[key])
    says(lambda: weights.read('s3://bucket/no.pth'), 's3://bucket/no.pth', 'cannot read')


def test_roots_that_nothing_reads():
    says(lambda: weights.find('s3://a/b.pth'), 's3://a/b.pth', 'petrel_client')
    says(lambda: weights.find('gs://a/b.pth'), 'gs://a/b.pth', 's3://', 'register_backend')

    class Bucket(BaseStorageBackend):
        def get(self, filepath):
            return b'no checkpoint'

        def get_text(self, filepath):
            return ''

    register_backend('bucket', Bucket, prefixes='gs')
    try:
        assert weights.find('gs://a/b.pth') == 'gs://a/b.pth'
        says(lambda: weights.read('gs://a/b.pth'), 'gs://a/b.pth', 'truncated')
    finally:
        del backends['bucket'], prefix_to_backends['gs']
