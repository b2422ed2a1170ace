"""Options of a test: how many images at a time, where, averaged over mirror images, into a file."""

import copy
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import test_tools
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from randomize import randomize
from test_tools import CLASSIFICATION, DETECTION, SEGMENTATION, refusal, shallow

import fastvit_mm
from fastvit_mm import FastViTError, launch
from fastvit_mm.evaluation.mirrored import augment_test
from fastvit_mm.export import export, runtime
from fastvit_mm.export.inputs import test_sizes as sizes_of

ROOT = Path(__file__).parent.parent
home, tool = test_tools.home, test_tools.tool


@pytest.fixture(scope='module')
def segmenter(tmp_path_factory):
    """A config and a checkpoint of random weights and statistics."""
    folder = tmp_path_factory.mktemp('segmenter')
    config = shallow(SEGMENTATION, folder)
    classes = {'model.decode_head.num_classes': 6}
    model = randomize(fastvit_mm.init_model(config, cfg_options=classes))
    torch.save(dict(state_dict=model.state_dict()), folder / 'model.pth')
    return config, folder / 'model.pth'


def test_images_of_several_sizes_in_a_batch(segmenter, tool, tmp_path):
    """A segmentor cannot stack them, as those of ADE20K."""
    config = tmp_path / 'unequal.py'
    config.write_text(
        f'_base_ = {str(segmenter[0])!r}\n'
        'resize = dict(type="RandomResize", scale=(512, 64), ratio_range=(0.5, 1.5), '
        'keep_ratio=True)\n'
        'test_pipeline = [dict(type="LoadImageFromFile"), resize, dict(type="PackSegInputs")]\n'
        'test_dataloader = dict(dataset=dict(pipeline=test_pipeline))\n'
        'test_evaluator = dict(_delete_=True, type="DumpResults", out_file_path="x.pkl")\n'
    )
    more = ('--demo', '--work-dir', tmp_path / 'run', '--batch-size', 3)
    refusal(tool('test', config, segmenter[1], *more), 'several sizes', 'leave out --batch-size')


def test_a_metric_that_is_not_installed(segmenter, monkeypatch):
    """Said before the run: mmdet's own warning is left out where nothing needs the package."""
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    metric = dict(type='mmdet.FasterCocoMetric')
    for evaluator in (metric, [metric]):
        with pytest.raises(FastViTError, match='FasterCocoMetric needs faster_coco_eval: pip'):
            launch.Runner.build_evaluator(object.__new__(launch.Runner), evaluator)


def test_where_the_results_go_is_known_before(segmenter, tool, tmp_path):
    (tmp_path / 'file').write_text('')
    out = tmp_path / 'file' / 'out.json'
    refusal(tool('test', *segmenter, '--demo', '--out', out), 'file cannot be created')


def metrics(tool, out, *args):
    code, err = tool('test', *args, '--demo', '--out', out, '--work-dir', out.parent / 'run')
    assert code == 0, err
    return {k: v for k, v in json.loads(out.read_text()).items() if 'time' not in k}


def test_batches_and_device(segmenter, tool, tmp_path, monkeypatch):
    config = shallow(CLASSIFICATION, tmp_path)
    cfg = fastvit_mm.demo.apply_demo(Config.fromfile(config))
    model = randomize(fastvit_mm.init_model(cfg))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    given = (config, tmp_path / 'model.pth')
    one = metrics(tool, tmp_path / 'one.json', *given)
    steps, places, test = [], set(), launch.Runner.test

    def watched(runner):
        places.update(p.device.type for p in runner.model.parameters())
        runner.model.backbone.register_forward_pre_hook(lambda _, args: steps.append(len(args[0])))
        return test(runner)

    monkeypatch.setattr(launch.Runner, 'test', watched)
    three = metrics(tool, tmp_path / 'three.json', *given, '--batch-size', 3, '--device', 'cpu')
    assert steps == [3, 3, 2] and places == {'cpu'} and three == pytest.approx(one, abs=1e-3)
    with pytest.raises(FastViTError, match='--device: several processes choose their own'):
        launch.test_runner(Config(dict(launcher='pytorch')), segmenter[1], 'cpu')
    refusal(tool('test', *given, '--demo', '--device', 'cuda:99'), '--device cuda:99')
    assert tool('test', *given, '--batch-size', 0)[0] == 2


@pytest.mark.parametrize('form', [[], ['--reparam']], ids=['training', 'deploy'])
def test_mirrored_images(segmenter, tool, tmp_path, form, monkeypatch):
    """The mean of an image's probabilities and those of its mirror image, turned back."""
    config, checkpoint = segmenter
    out = tmp_path / 'predictions.pkl'
    args = ('--demo', '--tta', '--out', out, '--work-dir', tmp_path / 'run', *form)
    code, err = tool('test', config, checkpoint, *args)
    assert code == 0, err
    cfg = Config.fromfile(config)
    fastvit_mm.demo.apply_demo(cfg)
    cfg.work_dir = str(tmp_path / 'own')
    runner = launch.test_runner(cfg, str(checkpoint))
    runner.load_or_resume()
    model = runner.model.eval()
    agree = []
    for item, found in zip(
        runner.test_dataloader.dataset, pickle.loads(out.read_bytes()), strict=True
    ):
        sides = []
        for image in (item['inputs'], item['inputs'].flip(2)):  # padded after that
            sample = dict(inputs=[image], data_samples=[item['data_samples']])
            data = model.data_preprocessor(sample, False)
            metas = [one.metainfo for one in data['data_samples']]
            with torch.no_grad():
                scores = model.encode_decode(data['inputs'], metas).softmax(1)
            sides.append(scores[0, :, : image.shape[1], : image.shape[2]])
        alone, turned = sides
        ours = found['pred_sem_seg']['data'][0] if isinstance(found, dict) else found
        ours = torch.as_tensor(np.asarray(ours)).cpu()
        means = (alone + turned.flip(2), alone, alone + turned)
        labels = [one.argmax(0).cpu() for one in means]
        agree.append([(one == ours).float().mean() for one in labels])
    right, alone, not_turned_back = torch.tensor(agree).T
    assert right.min() > 0.995
    assert alone.mean() < 0.99 and not_turned_back.mean() < 0.99, 'they tell nothing'


@pytest.mark.slow
@pytest.mark.parametrize('exported', [False, True], ids=['checkpoint', 'file'])
def test_mirrored_classes(tool, tmp_path, exported):
    """The mean of an image's scores and those of its mirror image, also by an exported file."""
    config, file = shallow(CLASSIFICATION, tmp_path), tmp_path / 'model.pth'
    cfg = Config.fromfile(config)
    fastvit_mm.demo.apply_demo(cfg)
    model = randomize(fastvit_mm.init_model(cfg))
    torch.save(dict(state_dict=model.state_dict()), file)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        pipeline = Compose(cfg.test_dataloader.dataset.pipeline[1:])
    if exported:
        export(model, file := tmp_path / 'model.onnx', 'onnx', size=sizes_of(model, cfg)[0][0])
    out = tmp_path / 'predictions.pkl'
    args = ('--demo', '--tta', '--out', out, '--work-dir', tmp_path / 'run')
    code, err = tool('test', config, file, *args)
    assert code == 0, err
    differ = []
    for one in pickle.loads(out.read_bytes()):
        image, scores = mmcv.imread(one['img_path']), []
        sample = pipeline(dict(img=image, img_shape=image.shape[:2], gt_label=0))
        for inputs in (sample['inputs'], sample['inputs'].flip(2)):
            (found,) = model.test_step(pseudo_collate([dict(sample, inputs=inputs)]))
            scores.append(found.pred_score)
        torch.testing.assert_close(one['pred_score'].cpu(), sum(scores) / 2, rtol=1e-3, atol=1e-4)
        differ.append((scores[0] - scores[1]).abs().max())
    assert max(differ) > 1e-3, 'the mirror image tells nothing'


def test_labels_cannot_be_averaged(segmenter, monkeypatch):
    """Each of two is the only one for itself: the first would win."""
    info = dict(task='segmentor', classes=[], outputs=['labels'], preprocess=False)
    monkeypatch.setattr(runtime, 'Session', lambda *_: SimpleNamespace(info=info))
    model = fastvit_mm.init_model(segmenter[0])
    with pytest.raises(FastViTError, match=r'm\.onnx gives labels, .*--output logits'):
        runtime.attach(model, 'm.onnx', averaged=True)
    runtime.attach(model, 'm.onnx')


def test_what_averages_is_checked(segmenter, tmp_path, monkeypatch):
    """As the rest of the config: by name, with the nearest one that exists."""
    monkeypatch.chdir(tmp_path)
    flip, pack = dict(type='RandomFlip', prob=1.0, direktion='horizontal'), 'PackSegInputs'
    steps = dict(type='TestTimeAug', transforms=[[flip], [dict(type=pack)]])
    for settings, words in (
        (dict(tta_model=dict(type='SegTTAModell')), 'SegTTAModell.*did you mean SegTTAModel'),
        (dict(tta_pipeline=[dict(type='LoadImageFromFile'), steps]), 'direktion.*direction'),
    ):
        cfg = Config.fromfile(segmenter[0])
        fastvit_mm.demo.apply_demo(cfg)
        cfg.merge_from_dict(settings)
        with pytest.raises(FastViTError, match=words):
            launch.test_runner(cfg, str(segmenter[1]), tta=True)


def test_what_cannot_be_averaged(tool, segmenter, tmp_path):
    cfg = Config.fromfile(ROOT / DETECTION)
    with pytest.raises(FastViTError, match='tta_model'):
        augment_test(cfg)
    cfg.tta_model, cfg.tta_pipeline = dict(type='DetTTAModel'), [dict(type='Own')]
    augment_test(cfg)
    assert cfg.model.type == 'DetTTAModel' and cfg.model.module.type == 'MaskRCNN'
    assert cfg.test_dataloader.dataset.pipeline == [dict(type='Own')]
    cfg = Config.fromfile(ROOT / SEGMENTATION)
    one = cfg.test_dataloader.dataset
    both = dict(type='ConcatDataset', datasets=[one, copy.deepcopy(one)])
    cfg.test_dataloader.dataset = ConfigDict(both)
    augment_test(cfg)
    parts = cfg.test_dataloader.dataset.datasets
    assert [part.pipeline[-1].type for part in parts] == ['TestTimeAug'] * 2
    cfg = Config.fromfile(ROOT / SEGMENTATION)
    cfg.test_dataloader.dataset.pipeline[-1].meta_keys = ('img_path', 'ori_shape')
    augment_test(cfg)
    pack = cfg.test_dataloader.dataset.pipeline[-1].transforms[-1][0]
    assert set(pack.meta_keys) == {'img_path', 'ori_shape', 'flip', 'flip_direction'}
