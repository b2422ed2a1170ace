"""The command `fastvit`: its commands and their help, the package's configs by name, and what a
model costs."""

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import test_tools
import torch
import torch.nn as nn
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from randomize import randomize
from test_recipes import SIZES
from test_tools import SEGMENTATION, refusal, shallow
from torch.utils.flop_counter import FlopCounterMode

import fastvit_mm
from fastvit_mm import FastViTError, cli, complexity, configs
from fastvit_mm.export import FORMATS
from fastvit_mm.init import TASKS
from fastvit_mm.weights.engine import load_checkpoint

ROOT = Path(__file__).parent.parent
home, tool = test_tools.home, test_tools.tool


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope='module')
def fastvit(tmp_path_factory):
    """Run the command as pip would have installed it; gives exit code, stdout and stderr."""
    script = tmp_path_factory.mktemp('bin') / 'fastvit'
    script.write_text(
        'import sys\nfrom fastvit_mm.cli import main\n'
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )

    def call(*words, flags=()):
        command = [sys.executable, *flags, script, *words]
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            env={'PYTHONPATH': str(ROOT), 'COLUMNS': '80', 'PATH': ''},
        )
        return done.returncode, done.stdout, done.stderr

    return call


def loaded(log):
    """The modules in the log of `python -X importtime`."""
    return {line.rsplit('|', 1)[1].strip() for line in log.splitlines() if '|' in line}


def test_the_overview_fits_a_screen(fastvit):
    code, out, err = fastvit('--help', flags=['-X', 'importtime'])
    assert code == 0 and fastvit()[:2] == (0, out)
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 80
    assert all(re.search(f'^  {name} +\\w', out, re.MULTILINE) for name in cli.COMMANDS)
    assert 'fastvit_mm.cli' in loaded(err) and 'torch' not in loaded(err)


@pytest.mark.parametrize('name', sorted(set(cli.COMMANDS) - cli.SLOW))
def test_help_is_quick(name, fastvit):
    """It needs nothing that takes seconds to import: neither torch nor numpy."""
    code, out, err = fastvit(name, '--help', flags=['-X', 'importtime'])
    assert code == 0 and out.startswith(f'usage: fastvit {name} ')
    heavy = {'torch', 'numpy', 'mmengine', 'cv2', 'matplotlib', 'rich', 'fastvit_mm.launch'}
    assert not loaded(err) & heavy


def test_a_command_that_does_not_exist(fastvit):
    code, out, err = fastvit('trian', 'x.py', flags=['-X', 'importtime'])
    assert (code, out) == (2, '')
    assert 'error: there is no command trian: did you mean train?' in err.splitlines()
    assert 'torch' not in loaded(err)


@pytest.mark.slow
def test_a_command_runs_as_its_tool(fastvit):
    code, out, err = fastvit('train', 'no.py')
    assert (code, out) == (2, '') and err.splitlines()[-1].startswith('error: config no.py does')
    # its processes are spawned: they begin by importing what started them
    small = ('--archs', 't8', '--sizes', 32, '--batch', 1, '--seconds', 0, '--threads', 1)
    code, out, err = fastvit('benchmark', 'deploy', *small)
    assert code == 0 and '| ratio |' in out, err


def test_only_our_own_script_explains(tmp_path, monkeypatch):
    """Someone else's program of this name sees a plain import, whatever it is called with."""
    script = tmp_path / 'fastvit'
    for argv in ([script], [script, '--help'], [script, 'train', '--help']):
        monkeypatch.setattr(sys, 'argv', list(map(str, argv)))
        script.write_text('from fastvit_mm.cli import main\n')
        assert cli.only_explains()
        script.write_text('import fastvit_mm\n')
        assert not cli.only_explains()
        script.write_bytes(b'\xff\xfe')
        assert not cli.only_explains()
        script.unlink()
        assert not cli.only_explains()


def test_other_programs_see_the_whole_package():
    """Whatever they are called with, a plain import registers everything."""
    code = (
        "import sys; sys.argv = ['train.py', '--help']; import fastvit_mm; "
        "from mmengine.registry import MODELS; print('FastViT' in MODELS)"
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ['True'], done.stderr


def test_every_command_has_a_tool_that_only_calls_it():
    other_names = dict(check='check_data', plot='plot_log', convert='convert_weights')
    for name in cli.COMMANDS:
        if not (path := ROOT / 'tools' / f'{other_names.get(name, name)}.py').exists():
            assert name == 'init'
            continue
        text = path.read_text()
        assert f'from fastvit_mm.cli.{name} import main\n' in text
        assert text.endswith("\nif __name__ == '__main__':\n    launch.run(main)\n")
    assert len(list((ROOT / 'tools').glob('*.py'))) == len(set(cli.COMMANDS) - {'init'})


def test_help_names_what_the_library_knows(capsys):
    """Which it cannot ask, without the seconds that importing it takes."""
    with pytest.raises(SystemExit):
        import_module('fastvit_mm.cli.init').main(['--help'])
    assert f'--task {{{",".join(TASKS)}}}' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        import_module('fastvit_mm.cli.export').main(['--help'])
    shown = ' '.join(capsys.readouterr().out.split())
    for name, one in FORMATS.items():
        assert name in shown and one.suffix in shown


# ---------------------------------------------------------------------------------------- configs


def test_configs_by_name(tool, tmp_path, monkeypatch):
    name = 'segmentation/fpn_fastvit_t8_ade20k'
    assert configs.find(f'fastvit_mm::{name}') == ROOT / f'configs/{name}.py'
    assert configs.find(f'fastvit_mm::{name}.py') == ROOT / f'configs/{name}.py'
    assert not [one for one in configs.names() if '_base_' in one or one.endswith('.py')]
    for wrong, words in {
        'fastvit_mm::segmentation/fpn_fastvit_t9_ade20k': ('did you mean', 'fpn_fastvit_t8_ade20k'),
        'fastvit_mm::segmentation/_base_/ade20k': ('does not exist',),
        'fastvit_mm::../setup': ('does not exist',),
    }.items():
        refusal(tool('train', wrong), wrong, *words)
        refusal(tool('info', wrong), wrong, *words)
    model = fastvit_mm.init_model('fastvit_mm::classification/fastvit_t8_in1k')
    assert type(model).__name__ == 'ImageClassifier'


def test_configs_of_a_wheel(tmp_path, monkeypatch):
    """There they are in the package, and no setup.py is beside it."""
    package = tmp_path / 'site-packages' / 'fastvit_mm'
    shutil.copytree(ROOT / 'configs', package / '.mim' / 'configs')
    monkeypatch.setattr(configs, '__file__', str(package / 'configs.py'))
    one = 'detection/mask_rcnn_fastvit_t8_coco'
    assert configs.find(f'fastvit_mm::{one}') == package / f'.mim/configs/{one}.py'


def test_list_models():
    """All models of all metafiles, each with its config."""
    files = [yaml.safe_load(path.read_text()) for path in ROOT.glob('configs/*/metafile.yml')]
    known = {one['Name']: one['Config'] for content in files for one in content['Models']}
    assert fastvit_mm.list_models() == sorted(known) and len(files) == 4
    assert {Path(one).name for one in configs.names()} >= set(known)
    t8 = fastvit_mm.list_models('*_t8_*')
    assert t8 == [name for name in sorted(known) if '_t8_' in name] and len(t8) > 3


HUB = """
import {first}, {second}
import fastvit_mm, mmpretrain
fastvit_mm.install()
mine = [name for name in fastvit_mm.list_models() if name.startswith('fastvit')]
assert mmpretrain.list_models('*fastvit*') == mine and len(mine) > 10
assert len(mmpretrain.list_models()) > 300 + len(mine)
model = mmpretrain.get_model('fastvit_t8_in1k')
print(type(model.backbone).__module__)
"""


@pytest.mark.slow
@pytest.mark.parametrize('order', [('fastvit_mm', 'mmpretrain'), ('mmpretrain', 'fastvit_mm')])
def test_mmpretrain_lists_ours(order):
    code = HUB.format(first=order[0], second=order[1])
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1:] == ['fastvit_mm.models.fastvit'], done.stderr


def test_mmpretrain_loads_the_authors_names(tmp_path):
    """Its own loader would leave the initial weights as they are, and only log it."""
    import mmpretrain

    model = randomize(fastvit_mm.init_model('fastvit_mm::classification/fastvit_t8_in1k'))
    state = fastvit_mm.weights.convert(model.state_dict(), 'apple', False, 'here')
    torch.save(dict(state_dict=state), tmp_path / 'authors.pth.tar')
    again = mmpretrain.get_model('fastvit_t8_in1k', pretrained=str(tmp_path / 'authors.pth.tar'))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    torch.save(dict(state_dict={'other': torch.ones(1)}), tmp_path / 'other.pth')
    with pytest.raises(FastViTError, match=r'other\.pth'):
        mmpretrain.get_model('fastvit_t8_in1k', pretrained=str(tmp_path / 'other.pth'))
    authors, plain = str(tmp_path / 'authors.pth.tar'), [(r'^module\.', '')]
    load_checkpoint(again, authors, 'cpu', False, None, revise_keys=plain)
    with pytest.raises(FastViTError, match='revise_keys'):
        load_checkpoint(again, authors, revise_keys=[('^a', 'b')])
    pair = nn.Linear(1, 1)
    torch.save(dict(state_dict={'a.' + k: v for k, v in pair.state_dict().items()}), authors)
    load_checkpoint(pair, authors, strict=True, revise_keys=[(r'^a\.', '')])


# ------------------------------------------------------------------------------------------- info


@pytest.mark.parametrize('arch', ['t8', 'sa12'])
def test_costs_of_a_classifier(arch):
    """Against the published number of parameters, and multiply-adds counted in another way."""
    model = fastvit_mm.init_model(f'fastvit_mm::classification/fastvit_{arch}_in1k')
    metafile = yaml.safe_load((ROOT / 'configs/classification/metafile.yml').read_text())
    stated = {one['Name']: one['Metadata'].get('Parameters') for one in metafile['Models']}
    found = complexity.compare(model, (256, 256))
    assert found.training.parameters == stated[f'fastvit_{arch}_in1k']
    parameters, giga = SIZES[arch][:2]
    assert found.deploy.parameters / 1e6 == pytest.approx(parameters, abs=5e-4)
    assert found.deploy.multiply_adds / 1e9 == pytest.approx(giga, abs=5e-4)
    assert found.deploy.layers < found.training.layers
    assert found.deploy.activations < found.training.activations
    assert found.deploy.kept is None and found.training.kept > 3 * found.training.activations
    outputs = [part.output for part in found.training.parts if part.name.startswith('stage')]
    widths = fastvit_mm.ARCHS[arch]['widths']
    assert outputs == [(w, 64 >> i, 64 >> i) for i, w in enumerate(widths)]
    assert [part.output for part in found.deploy.parts] == [
        part.output for part in found.training.parts
    ]


@pytest.mark.parametrize('task', ['segmentation', 'detection', 'hand_mesh'])
def test_costs_leave_nothing_out(task):
    """The parts' sum is what PyTorch counts for the whole model."""
    names = dict(
        segmentation='fpn_fastvit_t8_ade20k',
        detection='mask_rcnn_fastvit_t8_coco',
        hand_mesh='vertices_fastvit_t8_freihand',
    )
    options = {'model.head.hand_model': 'synthetic'} if task == 'hand_mesh' else {}
    model = fastvit_mm.init_model(f'fastvit_mm::{task}/{names[task]}', cfg_options=options)
    number = sum(p.numel() for p in model.parameters())
    found = complexity.compare(model, (64, 96))
    assert found.training.parameters == number
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        complexity.forward(model.eval(), torch.empty(1, 3, 64, 96, device='meta'))
    assert found.training.multiply_adds == counter.get_total_flops() / 2 > 0
    assert all(part.multiply_adds > 0 for part in found.training.parts if part.layers)
    merged = zip(found.training.parts, found.deploy.parts, strict=True)
    assert all(a.multiply_adds >= b.multiply_adds for a, b in merged)


def test_costs_of_an_auxiliary_head():
    """Training computes it and keeps what it needs; a test does not."""
    name, kept = 'fastvit_mm::segmentation/fpn_fastvit_t8_ade20k', []
    for number in (0, 1, 2):
        cfg = Config.fromfile(configs.find(name))
        head = dict(cfg.model.decode_head, type='FCNHead', in_channels=256, channels=32)
        head.pop('feature_strides', None)
        heads = [dict(head, in_index=i) for i in range(number)]
        cfg.model.auxiliary_head = None if not heads else heads[0] if number == 1 else heads
        model = fastvit_mm.init_model(cfg)
        found = complexity.costs(model, (64, 64))
        kept.append(found.kept)
        assert found.activations == complexity.costs(model, (64, 64), training=False).activations
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize(
    'name', ['detr/detr_r50_8xb2-150e_coco', 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco']
)
def test_costs_that_cannot_be_counted(name):
    import mmdet

    cfg = Config.fromfile(Path(mmdet.__file__).parent / f'.mim/configs/{name}.py')
    fastvit_mm.weights.drop_pretrained(cfg.model)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    with pytest.raises(FastViTError, match=f'of {type(model).__name__} .* cannot be counted'):
        complexity.costs(model, (64, 64))


def test_detection_costs_what_the_recipes_say():
    """G multiply-adds of a training step's forward pass in docs/reproduce.md."""
    text = (ROOT / 'docs/reproduce.md').read_text().split('## COCO')[1]
    model = fastvit_mm.init_model('fastvit_mm::detection/mask_rcnn_fastvit_t8_coco').to('meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        complexity.forward(model, torch.empty(1, 3, 800, 1216, device='meta'), *complexity.SAMPLED)
    stated = re.search(r'\| T8 \|[^|]*\| (\d+) \|', text)[1]
    assert round(counter.get_total_flops() / 2e9) == int(stated)


def test_memory_by_hand():
    """A tensor counts while it exists: of a chain two at a time, with a residual three."""
    chain = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3))).to('meta')
    image = torch.empty(1, 4, 8, 8, device='meta')
    one = image.numel() * 4
    with torch.no_grad():
        with complexity.LiveMemory() as memory:
            chain(image)
        assert memory.peak == 2 * one and memory.now == 0
        with complexity.LiveMemory() as memory:
            first = chain[0](image)
            kept = chain[2](chain[1](first)) + first
        assert memory.peak == 3 * one and memory.now == 2 * one
        del kept


def test_info(tool, tmp_path, capfd):
    """Prints a table of the stages that fits the config's own test size, or another."""
    config = shallow(SEGMENTATION, tmp_path)
    import_module('fastvit_mm.cli.info').main([str(config)])
    shown = capfd.readouterr().out
    assert 'EncoderDecoder, an image of 512 x 512' in shown
    for name in ('stem', 'stage 1', 'stage 4', 'neck', 'decode head', 'all'):
        assert re.search(rf'^{name}  ', shown, re.MULTILINE), name
    assert len(re.findall(r'  1 \w+Block ', shown)) == 4
    assert len(shown.splitlines()) < 20
    code, err = tool('info', config, '--size', 16, 64)
    assert code == 2 and 'argument --size' in err and 'at least 32' in err
