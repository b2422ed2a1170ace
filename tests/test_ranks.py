"""Two processes that really run (gloo, on the CPU): what the hooks do on several ranks."""

import copy
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.hooks import EMAHook, Hook
from mmengine.model import MMDistributedDataParallel
from randomize import randomize, relative
from small_runs import At, NamedDrawn, Net, files, make_run
from test_hook import Noise, Spy, make_runner, tiny_model

import fastvit_mm
from fastvit_mm import FastViT, FastViTError
from fastvit_mm.data.problems import Problem, settle_once
from fastvit_mm.running.sync_batch_norm import SyncBatchNorm

RANKS = 2


def rank_main(rank, folder):
    torch.set_num_threads(1)
    address, patience = f'file://{folder}/rendezvous', timedelta(seconds=180)
    dist.init_process_group(
        'gloo', init_method=address, rank=rank, world_size=RANKS, timeout=patience
    )
    results = {run.__name__: run(rank, Path(folder)) for run in SCENARIOS}
    (Path(folder) / f'{rank}.json').write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def results(tmp_path_factory, once):
    return once('ranks', lambda: run_scenarios(tmp_path_factory.mktemp('ranks')))


def run_scenarios(folder):
    """What every scenario returned on each rank. None may wait for ever."""
    context = mp.start_processes(
        rank_main, (str(folder),), nprocs=RANKS, join=False, start_method='spawn'
    )
    deadline = time.monotonic() + 300
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, 'a rank waits for ever'
    finally:
        for process in context.processes:
            process.kill()
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(RANKS)]


def statistics(model):
    """Running means and variances of every BatchNorm, one vector."""
    state = model.state_dict()
    return torch.cat([v.flatten() for k, v in state.items() if k.endswith(('_mean', '_var'))])


class Watch(fastvit_mm.hooks.SyncStatisticsHook):
    """The hook, which notes how far the ranks were apart and then are from their mean."""

    def __init__(self):
        self.apart, self.wrong = [], []

    def average(self, runner):
        ema = next(h for h in runner.hooks if isinstance(h, EMAHook))
        models = (runner.model.module, ema.ema_model.module)
        before = [statistics(m) for m in models]
        super().average(runner)
        for model, own in zip(models, before, strict=True):
            each = [torch.empty_like(own) for _ in range(RANKS)]
            dist.all_gather(each, own)
            self.apart.append(float((each[0] - each[1]).abs().max()))
            self.wrong.append(float((statistics(model) - sum(each) / RANKS).abs().max()))


def whole_run(rank, folder):
    """Train, average the statistics, test in the deploy form."""
    ema = dict(type='EMAHook', momentum=0.3, update_buffers=True)
    watch, spy, model = Watch(), Spy(), tiny_model()
    runner = make_runner(folder, model, [ema, watch, spy], name='whole')
    runner.model = MMDistributedDataParallel(model, broadcast_buffers=False)
    runner.train()
    metrics = runner.test()
    with torch.no_grad():
        alone = torch.stack(model.eval()(Noise().images, mode='predict')).mean()
    return dict(
        apart=watch.apart,
        wrong=watch.wrong,
        metrics=metrics,
        alone=alone.item(),
        merged=not any('conv_scale' in k for k in spy.tested.state_dict()),
        weights=float(sum(p.detach().double().abs().sum() for p in model.parameters())),
        restored=runner.model.module is model,
    )


def one_wrong_merge(rank, folder):
    """Every rank ends, the one that is right too, and a later test runs."""
    runner = make_runner(folder, tiny_model(), [fastvit_mm.ReparameterizeHook()], name='merge')
    correct = FastViT.switch_to_deploy

    def forgetful(self):
        correct(self)
        if rank == 1:
            next(self.parameters()).data.mul_(1.01)

    said = []
    for merge in (forgetful, correct):
        FastViT.switch_to_deploy = merge
        try:
            said.append(runner.test()['mean'])
        except FastViTError as error:
            said.append(str(error))
    return said


def one_unreadable_image(rank, folder):
    runner = make_runner(folder, tiny_model(), [fastvit_mm.ReparameterizeHook()], name='image')

    class Broken(Noise):
        def __getitem__(self, i):
            raise OSError(f'image {i} cannot be read')

    if rank == 1:
        runner.test_dataloader.dataset.__class__ = Broken
    try:
        runner.test()
    except (FastViTError, OSError) as error:
        return [type(error).__name__, str(error)]


def checkpoint_of_an_iteration(rank, folder):
    """What rank 0 saves between two epochs, against the mean of what the ranks had gathered."""
    kept = []

    class Keep(Hook):
        priority = 'VERY_HIGH'

        def after_train_iter(self, runner, *args, **kwargs):
            own = statistics(runner.model.module)
            each = [torch.empty_like(own) for _ in range(RANKS)]
            dist.all_gather(each, own)
            kept.append(each)

    model, hooks = tiny_model(), [Keep(), fastvit_mm.hooks.SyncStatisticsHook()]
    save = dict(type='CheckpointHook', by_epoch=False, interval=1, save_last=False)
    settings = dict(train_cfg=dict(by_epoch=False, max_iters=2))
    settings.update(default_hooks=dict(checkpoint=save), log_processor=dict(by_epoch=False))
    runner = make_runner(folder, model, hooks, name='iterations', **settings)
    runner.model = MMDistributedDataParallel(model, broadcast_buffers=False)
    runner.train()
    dist.barrier()
    found = []
    for number, each in enumerate(kept, 1):
        file = torch.load(folder / 'iterations' / f'iter_{number}.pth', weights_only=False)
        state = {k: v for k, v in file['state_dict'].items() if k.endswith(('_mean', '_var'))}
        saved = torch.cat([v.flatten() for v in state.values()])
        apart = float((each[0] - each[1]).abs().max())
        found.append([apart, float((saved - sum(each) / RANKS).abs().max())])
    return found


def normalization(rank, folder):
    """SyncBatchNorm against PyTorch's BatchNorm with the images of all ranks."""
    found = {}
    for momentum, dtype in ((0.1, torch.float64), (None, torch.float64), (0.1, torch.bfloat16)):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(7, 4, 5, 3, generator=generator, dtype=torch.float64) * 3 + 2
        slopes = torch.randn(7, 4, 5, 3, generator=generator, dtype=torch.float64)
        whole = randomize(torch.nn.BatchNorm2d(4, momentum=momentum).double())
        parts = copy.deepcopy(whole)
        parts.__class__ = SyncBatchNorm
        own = slice(0, 2) if rank == 0 else slice(2, 7)
        images, slopes = (x.to(dtype).double() for x in (images, slopes))
        results = []
        for norm, x, dy in ((whole, images, slopes), (parts, images[own], slopes[own])):
            if norm is parts and dtype is torch.bfloat16:
                norm, x, dy = norm.float(), x.to(dtype), dy.to(dtype)
            x = x.clone().requires_grad_()
            y = norm(x)
            y.backward(dy)
            for p in norm.parameters() if norm is parts else ():
                dist.all_reduce(p.grad)
            results.append([y, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
        (y, dx, *rest), mine = results
        reference = [y[own], dx[own], *rest]
        differences = [relative(a, b) for a, b in zip(mine, reference, strict=True)]
        found[f'{momentum} {dtype}'] = [max(differences), str(mine[0].dtype)]
    return found


def in_two(folder, **settings):
    """Train, both ranks into one work dir; gives the runner, and the exit code if there is one."""
    runner = make_run(folder, **settings)
    runner.model = MMDistributedDataParallel(runner.model, broadcast_buffers=False)
    try:
        runner.train()
    except SystemExit as end:
        return runner, end.code
    return runner, None


def one_signal(rank, folder):
    """SIGTERM reaches one rank in the middle of an epoch; the run is resumed."""

    def send(runner):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    calm, _ = in_two(folder / 'calm')
    sync = fastvit_mm.hooks.SyncStatisticsHook()
    stopped, code = in_two(folder / 'stopped', hooks=[At(5, send), sync])
    gathered = statistics(stopped.model.module).tolist()
    written = files(folder / 'stopped')
    resumed, _ = in_two(folder / 'stopped', resume=True)
    ends = [
        torch.load(folder / name / 'epoch_3.pth', weights_only=False)
        for name in ('calm', 'stopped')
    ]
    drawn = [float(r.model.module.head.weight.double().sum()) for r in (calm, resumed)]
    return dict(
        stop=[code, stopped.iter, written],
        gathered=gathered,
        # a rank's own running statistics are not in the checkpoint
        weights=[
            {k: v.tolist() for k, v in e['state_dict'].items() if 'running' not in k} for e in ends
        ],
        drawn=drawn,
    )


def one_infinite_loss(rank, folder):
    """The gradients are finite or infinite on both, so only one rank could know."""
    read, said = [], []

    class Infinite(Net):
        def forward(self, inputs, target=None, data_samples=None, mode='tensor'):
            read.extend(sample.img_path for sample in data_samples)
            out = super().forward(inputs, target, mode)
            if mode == 'loss' and rank == 1:
                out['loss_more'] = float('inf') * (out['loss'] if self.all else torch.ones(1))
            return out

    shuffled = dict(type='DefaultSampler', shuffle=True)
    loader = dict(dataset=NamedDrawn(), batch_size=2, sampler=shuffled)
    for Infinite.all in (False, True):
        try:
            in_two(folder / f'infinite {Infinite.all}', model=Infinite(), train_dataloader=loader)
        except FastViTError as error:
            said.append(str(error))
    return said, read


def checks_of_data(rank, folder):
    """Who looks at the data, and what each is told: of a missing file, of an error, of nothing."""
    looked, told = [], []

    def find(outcome):
        looked.append(rank)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    for outcome in ([Problem('a.jpg', 'does not exist')], OSError('no disk'), []):
        try:
            settle_once(lambda outcome=outcome: find(outcome))
            told.append(None)
        except Exception as error:
            told.append([type(error).__name__, str(error)])
    return dict(looked=looked, told=told)


SCENARIOS = (
    whole_run,
    one_wrong_merge,
    one_unreadable_image,
    checkpoint_of_an_iteration,
    normalization,
    one_signal,
    one_infinite_loss,
    checks_of_data,
)


def test_data_are_checked_once(results):
    first, second = (result['checks_of_data'] for result in results)
    assert (first['looked'], second['looked']) == ([0, 0, 0], [])
    missing = ['FastViTError', 'a.jpg does not exist']
    assert first['told'] == [missing, ['OSError', 'no disk'], None]
    assert second['told'] == [missing, ['RuntimeError', 'rank 0 failed: no disk'], None]


def test_a_whole_run(results):
    first, second = (result['whole_run'] for result in results)
    for run in (first, second):
        # of the model and of its average; each rank had gathered others
        assert len(run['apart']) == 2 and min(run['apart']) > 1e-3
        assert max(run['wrong']) < 1e-6
        assert run['merged'] and run['restored']
        assert run['metrics']['mean'] == pytest.approx(run['alone'], rel=1e-4)
    assert first['weights'] == second['weights'] and first['metrics'] == second['metrics']


def test_one_wrong_merge_ends_all(results):
    first, second = (result['one_wrong_merge'] for result in results)
    assert second[0].startswith('the deploy form differs from the training form')
    assert first[0] == f'rank 1 failed: {second[0]}'
    assert first[1] == second[1] and isinstance(first[1], float)


def test_one_unreadable_image_ends_all(results):
    first, second = (result['one_unreadable_image'] for result in results)
    assert second == ['OSError', 'image 0 cannot be read']
    assert first == ['FastViTError', 'rank 1 failed: image 0 cannot be read']


def test_a_checkpoint_of_an_iteration_has_the_statistics_of_all(results):
    for result in results:
        found = result['checkpoint_of_an_iteration']
        assert len(found) == 2
        for apart, wrong in found:
            assert apart > 1e-3 and wrong < 1e-6


def test_normalization_over_ranks(results):
    for result in results:
        found = result['normalization']
        assert len(found) == 3
        for name, (difference, dtype) in found.items():
            assert name.endswith(dtype)
            assert difference < (1e-2 if 'bfloat16' in dtype else 1e-12), (name, difference)


def test_one_signal_stops_all_after_the_same_iteration(results):
    for run in (result['one_signal'] for result in results):
        code, iteration, written = run['stop']
        assert code == 143 and iteration == 4  # mmengine counts it up after the hooks
        assert 'iter_5.pth' in written
        assert run['weights'][0] == run['weights'][1]
        assert run['drawn'][0] == run['drawn'][1] == results[0]['one_signal']['drawn'][0]
        assert run['gathered'] == results[0]['one_signal']['gathered'], 'not those of all ranks'


def test_one_infinite_loss_stops_all(results):
    (said, innocent), (same, guilty) = (result['one_infinite_loss'] for result in results)
    assert len(said) == 2 and said == same
    for message in said:
        assert message.startswith('iteration 1: ') and 'loss_more inf' in message
        assert f'images {", ".join(guilty[:2])} (of rank 1): look' in message
        assert not any(image in message for image in innocent)
