"""Training, tests, failures and checkpoints in any order: no run ends up with other weights."""

import copy
import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from test_hook import Noise, Regressor, train_more

from fastvit_mm import FastViT
from fastvit_mm.hooks import ReparameterizeHook
from fastvit_mm.launch import Runner

ARCH = dict(depths=(1, 0, 0, 0), widths=(8, 8, 8, 8), ffn_ratio=1)
PLACES = ('data', 'model', 'metric', 'result', 'first hook', 'last hook')
IMAGES = 8
FAULT = dict(place=None)


class Fault(Exception):
    pass


def fail_at(place):
    if FAULT['place'] == place:
        FAULT['place'] = None
        raise Fault(place)


class Images(Noise):
    def __getitem__(self, i):
        if i == 5:  # in the second batch: the first one has been counted
            fail_at('data')
        return super().__getitem__(i)


class Model(Regressor):
    calls = 0

    def forward(self, inputs, target=None, mode='tensor'):
        if mode == 'predict':
            fail_at('model')
        return super().forward(inputs, target, mode)


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)
        fail_at('metric')

    def compute_metrics(self, results):
        fail_at('result')
        return dict(images=len(results), mean=torch.stack(list(results)).double().mean().item())


class First(Hook):
    priority = 'VERY_HIGH'

    def before_test_epoch(self, runner):
        fail_at('first hook')

    before_val_epoch = before_test_epoch


class Last(Hook):
    """Fails when all others have run; and sees that everything starts from the trained weights."""

    priority = 'LOWEST'

    def before_test_epoch(self, runner):
        fail_at('last hook')

    before_val_epoch = before_test_epoch

    def after_train_epoch(self, runner):
        self.trained = weights(runner.model)

    def before_val(self, runner):
        assert same(weights(runner.model), self.trained)

    before_test = before_train_epoch = before_val

    def before_run(self, runner):
        self.trained = weights(runner.model)


class Mixed(OptimWrapper):
    """Mixed precision on a CPU."""

    def optim_context(self, model):
        return torch.autocast('cpu', torch.bfloat16)


def weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def build(ema, mixed, merged, folder):
    torch.manual_seed(0)
    loader = dict(batch_size=4, sampler=dict(type='DefaultSampler', shuffle=False))
    model = Model(FastViT(ARCH, out_indices=(0,)))
    hooks = [First(), Last()]
    hooks += [EMAHook(momentum=0.3, update_buffers=True)] if ema else []
    hooks += [ReparameterizeHook()] if merged else []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Runner(
        model,
        work_dir=str(folder),
        train_dataloader=dict(dataset=Noise(IMAGES), **loader),
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=1),
        optim_wrapper=(Mixed if mixed else OptimWrapper)(optimizer),
        val_dataloader=dict(dataset=Images(IMAGES), **loader),
        val_cfg=dict(fp16=mixed),
        val_evaluator=Evaluator([Count()]),
        test_dataloader=dict(dataset=Images(IMAGES), **loader),
        test_cfg=dict(fp16=mixed),
        test_evaluator=Evaluator([Count()]),
        default_hooks=dict(checkpoint=None, logger=None),
        custom_hooks=hooks,
        experiment_name=f'{folder}',
        default_scope='mmengine',
        log_level='ERROR',
    )


class Runs(RuleBasedStateMachine):
    folder, number = None, 0

    @initialize(ema=st.booleans(), mixed=st.booleans(), merged=st.booleans())
    def begin(self, ema, mixed, merged):
        FAULT['place'] = None
        Runs.number += 1
        self.mixed, self.merged = mixed, merged
        self.runner = build(ema, mixed, merged, f'{self.folder}/{Runs.number}')
        self.model = self.runner.model
        self.runner.train()
        self.average = next(
            (h.ema_model for h in self.runner.hooks if isinstance(h, EMAHook)), None
        )
        self.remember()

    def remember(self):
        self.trained = weights(self.model)
        self.averaged = weights(self.average.module) if self.average else None

    def unchanged(self):
        assert self.runner.model is self.model
        assert same(weights(self.model), self.trained)
        assert not self.average or same(weights(self.average.module), self.averaged)

    @rule(epochs=st.integers(1, 2))
    def train(self, epochs):
        """With a validation after every epoch."""
        train_more(self.runner, epochs)
        assert self.runner.model is self.model
        assert not same(weights(self.model), self.trained)
        self.remember()

    def expected(self):
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.averaged or self.trained)
        with torch.no_grad():
            return model.eval()(Noise(IMAGES).images).double().mean().item()

    @rule(stage=st.sampled_from(['val', 'test']))
    def test(self, stage):
        metrics = getattr(self.runner, f'{stage}_loop').run()
        assert metrics['images'] == IMAGES
        tolerance = 0.05 if self.mixed else 1e-4
        assert math.isclose(metrics['mean'], self.expected(), rel_tol=tolerance, abs_tol=tolerance)
        self.unchanged()

    @rule(stage=st.sampled_from(['val', 'test']), place=st.sampled_from(PLACES))
    def fail(self, stage, place):
        FAULT['place'] = place
        try:
            getattr(self.runner, f'{stage}_loop').run()
        except Fault:
            pass
        else:
            raise AssertionError('it did not fail')

    @rule()
    def save(self):
        self.runner.save_checkpoint(self.runner.work_dir, 'saved.pth', None, meta={})
        saved = torch.load(f'{self.runner.work_dir}/saved.pth', weights_only=False)
        assert same(saved['state_dict'], self.averaged or self.trained)
        if self.average:
            kept = {k[7:]: v for k, v in saved['ema_state_dict'].items() if k != 'steps'}
            assert same(kept, self.trained)
        self.unchanged()

    @invariant()
    def the_model_is_whole(self):
        """The trained model itself is never merged, in no part."""
        if hasattr(self, 'model'):
            assert self.model.state_dict().keys() == self.trained.keys()
            own = {id(p) for p in self.model.parameters()}
            groups = self.runner.optim_wrapper.param_groups
            assert {id(p) for g in groups for p in g['params']} == own

    def teardown(self):
        DefaultScope._instance_dict.clear()


@pytest.mark.slow
def test_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(Runs, 'folder', tmp_path)
    some = settings(max_examples=max(8, settings().max_examples // 2), stateful_step_count=10)
    run_state_machine_as_test(Runs, settings=some)
