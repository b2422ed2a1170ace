"""The benchmark as people call it, at its smallest settings, and the arithmetic behind its figures.

Nothing here depends on how fast anything is.
"""

import importlib
import itertools
import json
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import yaml

from fastvit_mm import launch
from fastvit_mm.cli import benchmark
from fastvit_mm.complexity import saved_memory

ROOT = Path(__file__).parent.parent
SEGMENTER = f"""
_base_ = '{ROOT}/configs/segmentation/fpn_fastvit_t8_ade20k.py'
arch = dict(_delete_=True, depths=(1, 1, 1, 1), widths=(16, 32, 64, 64), ffn_ratio=2)
model = dict(backbone=dict(arch=arch), neck=dict(in_channels=[16, 32, 64, 64]))
"""
SPREAD = re.compile(r'[\d.,]+ \([\d.,]+-[\d.,]+\)')
TINY = ['--archs', 't8', '--sizes', '32', '--batch', '1']


@pytest.fixture(scope='module')
def tool():
    return benchmark


@pytest.fixture
def run(tool, monkeypatch, capfd):
    """Call the tool as its command line would; gives exit code, stdout and stderr."""
    monkeypatch.chdir(ROOT)
    limits = partial(tool.measure.limits, size=64, copied=2**20)
    monkeypatch.setattr(tool.measure, 'limits', limits)
    threads = torch.get_num_threads()

    def call(*args):
        code = 0
        fast = ['--seconds', '0', '--threads', '1']
        try:
            launch.run(lambda _: tool.main([str(a) for a in (*args, *fast)]))
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    'args',
    [
        ['deploy', *TINY],
        ['deploy', *TINY, '--half'],
        ['train', '--archs', 't8', '--sizes', '64', '--batch', '2'],
        ['train', '--archs', 't8', '--sizes', '64', '--batch', '2', '--checkpointing'],
        ['export', *TINY],
        ['compare', '--archs', 'FastViT-T8', 'MobileOne-S0'],
        ['growth', '--archs', 'sa12', '--sizes', '32', '64'],
        ['loading', '--images', '2', '--batch', '2', '--workers', '0'],
        ['processes', '--archs', 't8', '--sizes', '32', '--batch', '2'],
        ['whole', '--size', '64', '64'],
        ['hand', '--archs', 't8', '--heads', 'vertices', '--size', '64'],
    ],
    ids=lambda args: ' '.join(args[:1] + [a for a in args if a in ('--half', '--checkpointing')]),
)
def test_subcommands(args, run, tmp_path):
    if args[0] == 'whole':
        config = tmp_path / 'segmenter.py'
        config.write_text(SEGMENTER)
        args = [*args, '--configs', config]
    files = tmp_path / 'new' / 'figures.json', tmp_path / 'new' / 'picture.png'
    document = tmp_path / 'document.md'
    document.write_text('Before.\n<!-- figures -->\nold\n<!-- /figures -->\nAfter.\n')
    code, out, err = run(
        *args, '--json', files[0], '--plot', files[1], '--doc', f'{document}#figures'
    )
    assert code == 0, err
    assert f'`python tools/benchmark.py {args[0]} ' in out
    for fact in ('CPU ', 'threads 1', f'torch {version("torch")}', 'GEMM, oneDNN, GFLOP/s '):
        assert fact in out
    assert 'memory copy, GB/s ' in out
    assert SPREAD.search(out), 'medians with their quartiles'
    assert 'no ratio' not in out
    if args[0] not in ('compare', 'growth'):
        assert '| ratio |' in out
        assert 'geometric mean of 1: ' in out

    text = document.read_text()
    assert text.startswith('Before.\n<!-- figures -->\n`python tools/benchmark.py ')
    assert text.endswith('\n<!-- /figures -->\nAfter.\n')
    assert set(re.findall('^[|].*', out, re.MULTILINE)) <= set(text.splitlines())
    figures = json.loads(files[0].read_text())
    assert figures['machine']['threads'] == '1'
    assert figures['limits'] and figures['tables']
    assert files[1].read_bytes().startswith(b'\x89PNG')


def test_refuses_when_outputs_differ(run, monkeypatch, tmp_path):
    sides = importlib.import_module('fastvit_mm.benchmarks.sides')
    deployed = sides.deployed

    def wrong(arch):
        models = deployed(arch)
        with torch.no_grad():
            models['ours'].stages[0].blocks[0].mlp.fc2.weight *= 1.1
        return models

    monkeypatch.setattr(sides, 'deployed', wrong)
    picture = tmp_path / 'picture.png'
    code, out, err = run('deploy', *TINY, '--json', tmp_path / 'f.json', '--plot', picture)
    assert code == 2
    assert re.search(r'^error: t8: no ratio: outputs differ by \S+$', err, re.MULTILINE)
    assert '| no ratio: outputs differ by' in out
    assert 'geometric mean' not in out
    assert (tmp_path / 'f.json').exists() and not picture.exists()


@pytest.mark.parametrize(
    'args, words',
    [
        (['deploy', '--device', 'cuda'], ['--device cuda', 'GPU']),
        (['deploy', '--modes', 'graph'], ['--modes graph', '--device cuda']),
        (
            ['deploy', '--archs', 't8', '--sizes', '32', '64', '--batch', '1', '2', '3'],
            ['--sizes', '--batch', '2 and 3'],
        ),
        (['whole', '--configs', 'none.py'], ['none.py']),
        (['loading', '--images', '1', '--batch', '2'], ['--images 1', '2']),
        (['growth', '--archs', 't8', '--sizes', '32'], ['--sizes', 'two']),
        (['growth', '--plot', 'README.md/x.png'], ['README.md/x.png']),
        (['growth', '--plot', 'x.txt'], ['x.txt', '.png']),
        (['growth', '--doc', 'README.md#none'], ['README.md', '<!-- none -->']),
    ],
)
def test_errors_are_one_line(args, words, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    code, _, err = run(*args)
    assert code == 2
    message = err.splitlines()[-1]
    assert message.startswith('error: ') and all(w in message for w in words), err


def test_calls_are_interleaved(tool, monkeypatch):
    """A function against itself, on a clock that ticks once a look: exactly 1, without spread."""
    measure = tool.measure
    ticks = itertools.count()
    monkeypatch.setattr(measure.time, 'perf_counter', lambda: float(next(ticks)))
    called = []
    times = measure.interleave(
        {name: partial(called.append, name) for name in 'ab'}, seconds=20, warmup=2
    )
    assert called == ['a', 'b'] * 12, '2 turns of warm-up, and 10 of 2 seconds each'
    assert len(times['a']) == len(times['b']) == 10
    assert measure.ratio(times['a'], times['b']) == measure.Spread(1, 1, 1)


def test_ratio_is_taken_turn_by_turn(tool):
    slow, fast = [2.0, 20.0, 3.0], [1.0, 10.0, 1.0]
    spread = tool.measure.ratio(slow, fast)
    assert (spread.median, spread.low, spread.high) == (2.0, 2.0, 2.5)
    assert tool.measure.geometric_mean([1.0, 4.0]) == pytest.approx(2)


def test_a_ratio_above_one_means_that_ours_is_faster(tool, monkeypatch):
    """Where the tables say it: twice as fast in the better layouts, thrice in the contiguous."""
    sides = importlib.import_module('fastvit_mm.benchmarks.sides')
    seconds = {
        'ours, contiguous': 2.0,
        'ours, channels last': 1.0,
        'timm, contiguous': 6.0,
        'timm, channels last': 2.0,
    }
    monkeypatch.setattr(
        tool.measure, 'interleave', lambda calls, *_: {name: [seconds[name]] * 3 for name in calls}
    )
    calls = dict.fromkeys(sides.LAYOUTS, lambda: torch.ones(1))
    outcome = sides.contest(dict(ours=calls, timm=calls), 1, 'cpu')
    assert (outcome.ratio.median, outcome.contiguous.median, outcome.seconds) == (2, 3, 1)
    assert outcome.row['ratio'] == outcome.ratio
    assert outcome.row['ratio, contiguous'] == outcome.contiguous
    assert outcome.row['faster layouts'] == 'channels last / channels last'


def test_how_many_times_faster_than_the_networks_of_the_paper(tool, monkeypatch):
    """The paper's own ratios, from latencies that have them: its claim and ours side by side."""
    compare = importlib.import_module('fastvit_mm.benchmarks.compare')
    seconds = {compare.CLAIMANT: 0.5} | {k: 0.5 * v for k, v in compare.CLAIMS.items()}
    measured = {name: [time] * 3 for name, time in seconds.items()}
    monkeypatch.setattr(compare, 'quickest', lambda *_: (lambda: torch.ones(1), 'contiguous', 1))
    monkeypatch.setattr(tool.measure, 'interleave', lambda *_: measured)
    monkeypatch.setattr(compare, 'scatter', lambda *_: None)
    report = tool.Report('command', {'CPU': ''}, {})
    args = SimpleNamespace(
        archs=list(seconds), runtime='torch', dtype='fp32', batch=1, seconds=1, device='cpu'
    )
    compare.run(args, report)
    rows = report.tables['How many times faster']
    assert {row[f'{compare.CLAIMANT} against'] for row in rows} == set(compare.CLAIMS)
    for row in rows:
        assert row['measured ratio'].median == pytest.approx(row['published, iPhone 12 Pro'])


def test_agreement(tool):
    agree = tool.measure.agree
    reference = torch.tensor([1.0, -2.0])
    assert agree((reference * 1.0001,), reference) is None
    assert 'outputs differ by 1.0e-02' in agree([reference * 1.01], reference)
    assert agree(reference * 1.01, reference, torch.bfloat16) is None
    assert 'not finite' in agree(reference * float('nan'), reference)


def test_memory(tool):
    measure = tool.measure
    layer = nn.Linear(64, 32, bias=False)
    x = torch.randn(8, 64)
    # The layer keeps its input for the weight, sigmoid and square keep the sigmoid's output.
    saved = saved_memory(lambda: layer(x).sigmoid().square(), layer.parameters())
    assert saved == 4 * 8 * (64 + 32)

    size = 2**26
    peak = measure.peak_memory(lambda: torch.ones(size, dtype=torch.uint8))
    assert peak is None or 0.9 * size < peak < 2 * size


def test_flops_count_two_for_a_multiply_add(tool):
    layer = nn.Linear(64, 32, bias=False)
    assert tool.measure.flops(lambda: layer(torch.randn(8, 64))) == 2 * 8 * 64 * 32


def test_exponent_of_a_power_law(tool):
    growth = importlib.import_module('fastvit_mm.benchmarks.growth')
    pixels = [256**2, 512**2, 1024**2]
    assert growth.exponent(pixels, [3 * p**1.5 for p in pixels]) == pytest.approx(1.5)
    assert growth.exponent(pixels, pixels) == pytest.approx(1)


def test_attention_holds_no_n_by_n_matrix(run):
    growth, sides = (
        importlib.import_module(f'fastvit_mm.benchmarks.{name}') for name in ('growth', 'sides')
    )
    with torch.inference_mode():
        row = growth.attention_memory(sides.deployed('sa12')['ours'], (800, 1333), 'cpu')
    assert (row['N'], row['heads']) == (25 * 42, 16)
    matrix = row['N x N of all heads, MB']
    assert row['largest tensor, MB'] < matrix / 8
    assert row['peak MB'] is None or row['peak MB'] < matrix / 2


# Parameters in millions and multiply-adds in billions that the paper prints.
@pytest.mark.parametrize(
    'variant, parameters, multiply_adds',
    [('ti', 9.5, 0.6), ('xs', 15.2, 1.5), ('s', 25.1, 4.0), ('b', 45.7, 9.3)],
)
def test_cmt_counts(variant, parameters, multiply_adds, tool):
    from fastvit_mm.benchmarks.cmt import CMT, VARIANTS

    model = CMT(variant).eval()
    size = VARIANTS[variant]['size']
    with torch.no_grad():
        flops = tool.measure.flops(lambda: model(torch.zeros(1, 3, size, size)))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(flops / 2e9, 1) == multiply_adds
    # The paper's own table of widths and depths makes 26.3 M of CMT-S: see cmt.py.
    assert count == pytest.approx(parameters, rel=0.05 if variant == 's' else 0.01)
    if variant == 's':
        assert flops / 2e9 == pytest.approx(4.0, rel=0.01)


def test_published_accuracies_are_those_of_the_configs(tool):
    from fastvit_mm.benchmarks.networks import CLAIMANT, CLAIMS, NETWORKS

    listed = {n.name: n.top1 for n in NETWORKS if n.family == 'FastViT'}
    models = yaml.safe_load((ROOT / 'configs/classification/metafile.yml').read_text())['Models']
    for arch, top1 in listed.items():
        (model,) = (m for m in models if m['Name'] == f'fastvit_{arch}_in1k')
        assert top1 in json.loads(json.dumps(model, default=str))['Results'][0]['Metrics'].values()
    assert {CLAIMANT, *CLAIMS} <= {n.label for n in NETWORKS}
    assert len({n.label for n in NETWORKS}) == len(NETWORKS)


class NormFirst(nn.Module):
    """Its BatchNorm stands behind the convolution, but is called before it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv(self.bn(x))


def test_norms_are_folded_where_that_changes_nothing(tool):
    from timm.layers import BatchNormAct2d

    from fastvit_mm.benchmarks.networks import fold_norms
    from fastvit_mm.benchmarks.sides import unsettle

    def norms(model):
        return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    x = torch.randn(2, 4, 8, 8)
    usual = unsettle(nn.Sequential(nn.Conv2d(4, 4, 3), BatchNormAct2d(4))).eval()
    folded = fold_norms(usual, x)
    assert not norms(folded)
    assert torch.allclose(folded(x), usual(x), atol=1e-5)
    assert norms(fold_norms(unsettle(NormFirst()).eval(), x))
