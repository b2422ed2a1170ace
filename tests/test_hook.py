"""The hook in real runs of mmengine's Runner."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, BaseTTAModel, MMDistributedDataParallel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from randomize import randomize, relative
from small_device import Held, SmallDevice, send
from torch.utils.data import Dataset

import fastvit_mm
from fastvit_mm import FastViT, FastViTError, ReparameterizeHook
from fastvit_mm.reparameterize import compare, distance

TINY = dict(depths=(1, 1, 1, 1), widths=(16, 16, 32, 32), ffn_ratio=2, attention=(0, 0, 0, 1))


class Noise(Dataset):
    """Images of noise whose target is their mean colour."""

    def __init__(self, length=8):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(length, 3, 32, 32, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return dict(inputs=self.images[i], target=self.images[i].mean((1, 2)))


class Drawing(Noise):
    """Images that are augmented: reading one draws from every generator."""

    def __getitem__(self, i):
        random.random(), np.random.rand(), torch.rand(1)
        return super().__getitem__(i)


class Flipped(Noise):
    """Each image as it is and turned over, as test-time augmentation packs them."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        turned = dict(item, inputs=item['inputs'].flip(-1))
        return {key: [item[key], turned[key]] for key in item}


class Mean(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return [torch.stack(predictions).mean(0) for predictions in data_samples_list]


class Regressor(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.LazyLinear(3)
        with torch.no_grad():
            self(torch.zeros(2, 3, 32, 32))

    def forward(self, inputs, target=None, mode='tensor'):
        if not isinstance(inputs, torch.Tensor):
            inputs = torch.stack(list(inputs))
        feature = self.backbone(inputs)[-1]
        out = self.head(feature.mean((2, 3)))
        if mode == 'loss':
            return dict(loss=F.mse_loss(out, torch.stack(list(target))))
        return list(out) if mode == 'predict' else out


class Keep(BaseMetric):
    """Keeps the predictions of a test and what made them."""

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(mean=torch.stack(results).mean().item())


class Spy(fastvit_mm.ReparameterizeHook):
    """The hook, with the tested model left to look at."""

    def after_test_epoch(self, runner, metrics=None):
        self.tested, self.metrics = runner.model, metrics
        super().after_test_epoch(runner, metrics)


def make_runner(tmp_path, model, hooks=(), name='run', tests=Noise, **args):
    data = dict(dataset=Noise(), sampler=dict(type='DefaultSampler', shuffle=True), batch_size=4)
    test = dict(dataset=tests(), sampler=dict(type='DefaultSampler', shuffle=False), batch_size=4)
    settings = dict(
        work_dir=str(tmp_path / name),
        train_dataloader=data,
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
        test_dataloader=test,
        test_cfg=dict(),
        test_evaluator=Keep(),
        custom_hooks=list(hooks),
        default_scope='mmengine',
        experiment_name=f'{tmp_path.name}-{name}',
        randomness=dict(seed=0),
        log_level='ERROR',
    )
    return Runner(model, **{**settings, **args})


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return Regressor(randomize(FastViT(TINY, drop_path_rate=0.3), seed))


def train_more(runner, epochs):
    runner.train_loop._max_epochs = runner.train_loop.epoch + epochs
    runner.train_loop._max_iters = runner.train_loop._max_epochs * 2
    runner.train_loop.run()


def test_a_test_leaves_no_trace(tmp_path):
    """train, test, train on gives the very numbers of train, train on."""
    states = []
    for tested in (False, True):
        runner = make_runner(tmp_path, tiny_model(), [ReparameterizeHook()], name=f'run{tested}')
        runner.train()
        if tested:
            model = runner.model
            runner.test()
            assert runner.model is model
        train_more(runner, 2)
        states.append((runner.model.state_dict(), runner.optim_wrapper.state_dict()))
    (plain, plain_optimizer), (tested, tested_optimizer) = states
    assert set(plain) == set(tested)
    assert any('conv_scale' in k for k in plain)
    for key, value in plain.items():
        assert torch.equal(value, tested[key]), key
    for index, own in plain_optimizer['state'].items():
        for key, value in own.items():
            assert torch.equal(value, tested_optimizer['state'][index][key]), (index, key)


def test_the_averaged_weights_are_merged(tmp_path):
    spy = Spy()
    ema = dict(type='EMAHook', momentum=0.3, update_buffers=True)
    runner = make_runner(tmp_path, tiny_model(), [ema, spy])
    runner.train()
    hook = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    averaged = copy.deepcopy(hook.ema_model.module).eval()
    trained = copy.deepcopy(runner.model).eval()
    runner.test_loop.run()  # runner.test() would begin a new average
    x = Noise().images
    with torch.no_grad():
        assert relative(spy.tested(x), averaged(x)) < 1e-5
        assert relative(spy.tested(x), trained(x)) > 1e-3
        assert relative(runner.model.eval()(x), trained(x)) == 0
    assert not any('conv_scale' in k for k in spy.tested.state_dict())


@pytest.fixture
def process_group(tmp_path):
    address = f'file://{tmp_path}/rendezvous'
    torch.distributed.init_process_group('gloo', init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('wrapper', [nn.DataParallel, MMDistributedDataParallel])
def test_wrapped_models(tmp_path, process_group, wrapper):
    spy = Spy()
    runner = make_runner(tmp_path, tiny_model(), [spy])
    wrapped = wrapper(runner.model)
    runner.model = wrapped
    runner.test()
    assert runner.model is wrapped
    x = Noise().images
    with torch.no_grad():
        assert relative(spy.tested(x), wrapped.module.eval()(x)) < 1e-5
    assert relative(torch.tensor(spy.metrics['mean']), spy.tested(x).mean()) < 1e-4


BACKBONES = dict(
    MobileOne=dict(type='mmpretrain.MobileOne', arch='s0', out_indices=(3,)),
    RepVGG=dict(type='mmpretrain.RepVGG', arch='A0', out_indices=(3,)),
)


@pytest.mark.parametrize('name', BACKBONES)
def test_other_backbones(tmp_path, name):
    spy = Spy()
    model = Regressor(randomize(MODELS.build(BACKBONES[name])))
    runner = make_runner(tmp_path, model, [spy])
    before = sum(p.numel() for p in model.parameters())
    runner.test()
    x = Noise().images[:2]
    with torch.no_grad():
        assert relative(spy.tested(x), model.eval()(x)) < 1e-4
    assert sum(p.numel() for p in spy.tested.parameters()) < before
    assert sum(p.numel() for p in runner.model.parameters()) == before


def test_says_what_it_did(tmp_path, monkeypatch):
    runner = make_runner(tmp_path, tiny_model(), [ReparameterizeHook()])
    lines = []
    monkeypatch.setattr(runner.logger, 'info', lines.append)
    runner.test()
    text = ' '.join(lines)
    before = sum(p.numel() for p in runner.model.parameters())
    after = sum(p.numel() for p in fastvit_mm.reparameterize(runner.model).parameters())
    assert f'{before:,} -> {after:,} parameters' in text
    assert 'largest relative difference of the outputs' in text


def test_refuses_a_wrong_merge(tmp_path, monkeypatch):
    """A dropped bias, the mistake that fresh BatchNorm statistics hide."""
    correct = FastViT.switch_to_deploy

    def forgetful(self):
        correct(self)
        with torch.no_grad():
            self.stages[1].blocks[0].mlp.conv.reparam_conv.bias.mul_(0.99)

    monkeypatch.setattr(FastViT, 'switch_to_deploy', forgetful)
    runner = make_runner(tmp_path, model := tiny_model(), [ReparameterizeHook()])
    with pytest.raises(FastViTError, match='more than rounding explains'):
        runner.test()
    assert runner.model is model


def test_rounding_is_told_from_mistakes():
    model = tiny_model().eval()
    x = Noise().images[:1]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        typed = copy.deepcopy(model).to(dtype)
        agreement = compare(typed, fastvit_mm.reparameterize(typed), x.to(dtype))
        assert 0 < agreement.difference <= agreement.limit < 1e3 * torch.finfo(dtype).eps


def test_nothing_to_merge(tmp_path):
    plain = Regressor(MODELS.build(dict(type='mmpretrain.ResNet', depth=18, out_indices=(3,))))
    for model in (plain, fastvit_mm.reparameterize(tiny_model())):
        with pytest.raises(FastViTError, match='nothing to reparameterize'):
            fastvit_mm.reparameterize(model)
        runner = make_runner(tmp_path, model, [ReparameterizeHook()], name=str(id(model)))
        with pytest.raises(FastViTError, match='--reparam'):
            runner.test()


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A runner that has trained, and whose test ended in an exception."""
    runner = make_runner(tmp_path, tiny_model(), [Spy()])
    runner.train()
    with monkeypatch.context() as patch:
        patch.setattr(Keep, 'compute_metrics', lambda self, results: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.test()
    return runner


def by_the_runner(runner):
    runner.train_loop._epoch = runner.train_loop._iter = 0
    runner.train()


@pytest.mark.parametrize('train', [by_the_runner, lambda runner: train_more(runner, 1)])
def test_training_goes_on_after_a_broken_test(broken, train):
    before = copy.deepcopy(broken.optim_wrapper.optimizer.param_groups[0]['params'][0])
    train(broken)
    weights = next(broken.model.parameters())
    assert weights is broken.optim_wrapper.optimizer.param_groups[0]['params'][0]
    assert not torch.equal(weights, before)


@pytest.mark.parametrize('test', [Runner.test, lambda runner: runner.test_loop.run()])
def test_a_test_after_a_broken_test(broken, test):
    assert math.isfinite(test(broken)['mean'])
    assert 'conv_scale' in ' '.join(broken.model.state_dict())


def test_a_model_put_in_after_a_broken_test_stays(broken):
    broken.model = other = tiny_model(seed=1)
    broken.test_loop.evaluator.results.clear()
    metrics = broken.test()
    assert broken.model is other
    expected = torch.stack(other.eval()(Noise().images, mode='predict')).mean()
    assert metrics['mean'] == pytest.approx(expected.item(), rel=1e-4)


def test_generators_are_put_back(tmp_path):
    """The whole state: a value drawn alike could come from a part of it."""
    runner = make_runner(tmp_path, tiny_model(), [ReparameterizeHook()], tests=Drawing)

    def states():
        return repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().tolist()

    runner.build_test_loop(runner._test_loop)  # as the first test of a run does, without a hook
    before = states()
    runner.test()
    assert states() == before


def test_augmented_tests(tmp_path):
    spy, model = Spy(), tiny_model()
    runner = make_runner(tmp_path, wrapped := Mean(model), [spy], tests=Flipped)
    metrics = runner.test()
    assert runner.model is wrapped and wrapped.module is model
    assert type(spy.tested) is Mean
    assert not any('conv_scale' in k for k in spy.tested.state_dict())
    x = Noise().images
    with torch.no_grad():
        expected = (model.eval()(x) + model(x.flip(-1))).mean() / 2
    assert metrics['mean'] == pytest.approx(expected.item(), rel=1e-4)


# --------------------------------------------------------------------------------- the comparison


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_what_is_not_finite_is_no_agreement(value):
    good = torch.tensor([1.0, 2.0])
    bad = torch.tensor([1.0, value])
    assert distance([good, bad], [good, good]) == math.inf
    assert distance([bad, good], [bad, good]) == math.inf
    assert distance([good], [good]) == 0
    model = tiny_model()
    model.backbone.stem[0].conv_scale.bn.bias.data[0] = value
    agreement = compare(model, fastvit_mm.reparameterize(model), Noise().images[:1])
    assert agreement.difference == agreement.rounding == math.inf and not agreement.explained


def test_nothing_compared_is_no_agreement():
    class Elsewhere(Regressor):
        def extract_feat(self, inputs):
            return inputs

    model = Elsewhere(randomize(FastViT(TINY)))
    with pytest.raises(FastViTError, match='cannot be checked'):
        compare(model, fastvit_mm.reparameterize(model), Noise().images[:1])


NEWER = pytest.mark.skipif(not hasattr(torch.backends, 'fp32_precision'), reason='older torch')


@pytest.fixture(params=['older', pytest.param('newer', marks=NEWER)])
def shortened(request):
    """float32 cut to TF32 on a GPU and bfloat16 on a CPU that has it, by either set of torch's
    names, which do not mix; gives what reads the settings, and what they should be."""
    backends = torch.backends
    if request.param == 'older':
        before = backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision('medium')
        backends.cudnn.allow_tf32 = True
        read = lambda: (torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32)  # noqa: E731
        yield read, ('highest', False)
        torch.set_float32_matmul_precision('highest')
        backends.cudnn.allow_tf32 = before
        return
    short = {backends.cuda.matmul: 'tf32', backends.cudnn.conv: 'tf32'}
    short |= {backends.mkldnn.matmul: 'bf16', backends.mkldnn.conv: 'bf16'}
    before = [product.fp32_precision for product in short]
    for product, precision in short.items():
        product.fp32_precision = precision
    yield lambda: tuple(product.fp32_precision for product in short), ('ieee',) * 4
    for product, precision in zip(short, before, strict=True):
        product.fp32_precision = precision


def test_compares_in_full_float32(shortened):
    (read, full), model = shortened, tiny_model()
    before, seen = read(), set()
    merged = fastvit_mm.reparameterize(model)
    for form in (model, merged):
        form.backbone.stem.register_forward_hook(lambda *_: seen.add(read()))
    agreement = compare(model, merged, Noise().images[:1])
    assert seen == {full} and read() == before != full
    assert agreement.explained and agreement.rounding < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_compares_in_full_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', True)
    model = tiny_model().cuda()
    agreement = compare(model, fastvit_mm.reparameterize(model), Noise().images[:1].cuda())
    assert agreement.explained and agreement.rounding < 1e-5


def test_compares_without_float64():
    """As on the CPU, but for rounding, on a device that refuses float64."""
    model, images = tiny_model().backbone.eval(), Noise().images[:1]
    expected = compare(model, fastvit_mm.reparameterize(model), images)
    with torch.no_grad(), SmallDevice():
        merged = fastvit_mm.reparameterize(send(model))
        assert {type(p) for p in merged.parameters()} == {Held}
        agreement = compare(model, merged, Held(images))
    assert agreement.rounding == pytest.approx(expected.rounding, rel=0.5)
    assert agreement.explained and agreement.difference > 0
