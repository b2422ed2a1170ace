"""One API for the three tasks: models, weights, class names and predictions."""

import copy

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from randomize import randomize, relative
from test_tools import CLASSIFICATION, CONFIGS, DETECTION, ROOT, SEGMENTATION, shallow
from test_weights import Hostile, build

import fastvit_mm
from fastvit_mm import FastViTError, apis, launch
from fastvit_mm.models.deploy import Deployed
from fastvit_mm.reparameterize import mergeable

# Small images; every box counts, as random weights are sure of nothing.
OPTIONS = {
    CLASSIFICATION: {
        'test_dataloader.dataset.pipeline.1.scale': 72,
        'test_dataloader.dataset.pipeline.2.crop_size': 64,
    },
    DETECTION: {
        'test_dataloader.dataset.pipeline.1.scale': (96, 64),
        'model.test_cfg.rcnn.score_thr': 0.0,
        'model.test_cfg.rcnn.max_per_img': 5,
    },
    SEGMENTATION: {'test_pipeline.1.scale': (256, 64)},
}
OUTPUTS = {CLASSIFICATION: 1000, DETECTION: 80, SEGMENTATION: 150}
tasks = pytest.mark.parametrize(
    'task', CONFIGS, ids=['segmentation', 'detection', 'classification']
)


class Case:
    """A config of one task, weights for it, and images."""

    def __init__(self, task, folder):
        self.config = shallow(task, folder)
        self.options = OPTIONS[task]
        self.checkpoint = folder / f'{self.config.stem}.pth'
        self.names = [f'kind {i}' for i in range(OUTPUTS[task])]
        self.state = randomize(self.model(checkpoint=None)).state_dict()
        self.save(dict(dataset_meta=dict(classes=self.names)))
        self.path = folder / 'image.png'
        self.image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
        mmcv.imwrite(self.image, str(self.path))

    def save(self, meta, state=None):
        torch.save(dict(state_dict=state or self.state, meta=meta), self.checkpoint)

    def model(self, checkpoint='own', **args):
        checkpoint = self.checkpoint if checkpoint == 'own' else checkpoint
        args = dict(cfg_options=self.options) | args
        return fastvit_mm.init_model(self.config, checkpoint, **args)


@pytest.fixture
def case(task, tmp_path):
    return Case(task, tmp_path)


def says(result):
    """A prediction as numbers, which tell images and weights apart."""
    if isinstance(result, dict):
        return torch.as_tensor(result['pred_scores'])
    if 'pred_instances' in result:
        return result.pred_instances.scores
    return result.seg_logits.data


@tasks
def test_images_in_every_form(case):
    model = case.model()
    by_path = says(fastvit_mm.inference(model, str(case.path)))
    assert by_path.numel()
    # the kinds in every order: the packages keep what the first one needed
    for images in (case.path, case.image, str(case.path)):
        assert torch.equal(says(fastvit_mm.inference(model, images)), by_path)
    other = 255 - case.image
    for images in ([case.image, case.path, other], (str(case.path), case.image, other)):
        results = fastvit_mm.inference(model, images)
        assert isinstance(results, list) and len(results) == 3
        for one in map(says, results[:2]):  # computed together
            assert (one - by_path).abs().max() < 1e-4 * by_path.abs().max()
        assert not torch.allclose(says(results[2]), by_path, rtol=1e-2, atol=1e-3)
    assert fastvit_mm.inference(model, []) == []
    one = fastvit_mm.inference(model, [case.image])
    assert isinstance(one, list) and len(one) == 1


@tasks
def test_batches(case, task, monkeypatch):
    """Images of several sizes, mixed: as one by one, and in few calls."""
    model, rng = case.model(), np.random.default_rng(1)
    sizes = [(70, 90), (64, 64), (70, 90), (50, 120), (64, 64), (70, 90), (70, 90)]
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    alone = [fastvit_mm.inference(model, one) for one in images]
    computed, step = [], model.test_step

    def note(batch):
        computed.append(len(batch['inputs']))
        return step(batch)

    monkeypatch.setattr(model, 'test_step', note)
    together = fastvit_mm.inference(model, [*images, case.path], batch_size=3)
    assert sum(computed) == 8 and max(computed) == 3 and len(computed) <= 5
    assert len(together) == 8
    for one, other in zip(alone, together[:7], strict=True):
        one, other = says(one), says(other)
        assert one.shape == other.shape and relative(other, one) < 1e-4
    assert relative(says(together[7]), says(fastvit_mm.inference(model, case.path))) < 1e-4
    assert relative(says(alone[0]), says(alone[2])) > 1e-3, 'they tell the images apart'
    computed.clear()
    fastvit_mm.inference(model, images[:2], batch_size=1)
    assert computed == [1, 1]
    with pytest.raises(FastViTError, match='at least 1'):
        fastvit_mm.inference(model, images, batch_size=0)


def test_images_of_many_sizes_do_not_pile_up():
    """However few have the same size, only some are kept."""
    kept, most = set(), []

    class Sized(apis.Predictor):
        def __init__(self):
            pass

        def prepare(self, image):
            kept.add(image)
            most.append(len(kept))
            return image

        def size(self, sample):
            return sample if sample % 3 else 0

        def compute(self, samples):
            kept.difference_update(samples)
            return [-one for one in samples]

    assert apis.in_batches(Sized(), list(range(1, 200)), 2) == [-i for i in range(1, 200)]
    assert max(most) <= 9 and not kept


@tasks
def test_both_forms_agree(case):
    model, merged = case.model(), case.model(reparam=True)
    assert not model.training and not merged.training
    assert any('conv_scale' in k for k in model.state_dict())
    assert not any('conv_scale' in k for k in merged.state_dict())
    assert set(mergeable(merged)) == set(mergeable(model))
    a, b = (says(fastvit_mm.inference(m, case.image)) for m in (merged, model))
    assert a.shape == b.shape and relative(a, b) < 1e-3
    # weights of the training form into a model that is built deployed
    deploy = {'model.backbone.deploy': True}
    if 'neck' in mergeable(model):
        deploy['model.neck.deploy'] = True
    built = case.model(cfg_options=case.options | deploy)
    assert built.state_dict().keys() == merged.state_dict().keys()
    for key, value in built.state_dict().items():
        torch.testing.assert_close(value, merged.state_dict()[key])
    with pytest.raises(FastViTError, match='nothing to reparameterize'):
        case.model(cfg_options=case.options | deploy, reparam=True)


@tasks
def test_configs_and_options(case, tmp_path):
    with pytest.raises(FastViTError, match=r'no\.py does not exist'):
        fastvit_mm.init_model(tmp_path / 'no.py')
    # a Config stays as it is, and gives the model that its file gives
    config = Config.fromfile(case.config)
    before = copy.deepcopy(config.to_dict())
    model = fastvit_mm.init_model(config, case.checkpoint, cfg_options=case.options)
    assert config.to_dict() == before
    for key, value in case.model().state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key

    changed = case.model(None, cfg_options={'model.backbone.out_indices': (3,)})
    assert changed.backbone.out_indices == (3,)
    with pytest.raises(FastViTError, match=r"unknown arch 't9'"):
        case.model(None, cfg_options={'model.backbone.arch': 't9'})
    config.default_scope = 'mmpose'
    with pytest.raises(FastViTError, match='mmpose'):
        fastvit_mm.init_model(config)


@tasks
def test_class_names(case, task):
    def names(model):
        if task == CLASSIFICATION:
            result = fastvit_mm.inference(model, case.image)
            assert result['pred_class'] == model.dataset_meta['classes'][result['pred_label']]
        return list(model.dataset_meta['classes'])

    # the checkpoint knows best
    assert names(case.model()) == case.names
    assert names(case.model(reparam=True)) == case.names
    # else the config
    case.save({})
    first = {CLASSIFICATION: 'tench, Tinca tinca', DETECTION: 'person', SEGMENTATION: 'wall'}
    for model in (case.model(), case.model(None)):
        assert names(model)[0] == first[task] and len(names(model)) == OUTPUTS[task]
    mine = [f'mine {i}' for i in range(OUTPUTS[task])]
    config = Config.fromfile(case.config)
    config.test_dataloader.dataset.metainfo = dict(classes=mine)
    model = fastvit_mm.init_model(config, case.checkpoint, cfg_options=case.options)
    assert names(model) == mine


@tasks
def test_weights_that_do_not_fit(case, task, tmp_path):
    other = shallow(task, tmp_path, third=2)
    with pytest.raises(FastViTError, match=r'does not fit.*stages\.2\.blocks\.1'):
        fastvit_mm.init_model(other, case.checkpoint)
    for change in (
        lambda state: state.pop('backbone.stem.0.conv_scale.conv.weight'),
        lambda state: state.update(extra=torch.ones(1)),
        lambda state: state.update({'backbone.stem.0.conv_scale.conv.weight': torch.ones(1)}),
    ):
        change(state := dict(case.state))
        case.save({}, state)
        with pytest.raises(FastViTError, match='does not fit'):
            case.model()
    with pytest.raises(FastViTError, match='does not exist'):
        case.model(tmp_path / 'no.pth')


@tasks
def test_hostile_files_run_no_code(case, tmp_path):
    trap = tmp_path / 'trap'
    case.save(dict(dataset_meta=Hostile(trap)))
    with pytest.raises(FastViTError, match='refused'):
        case.model()
    # nor does a config inside a checkpoint
    case.save(dict(config=f'open({str(trap)!r}, "w")\n'))
    fastvit_mm.inference(case.model(), case.image)
    assert not trap.exists()


@tasks
def test_nothing_is_downloaded(case, task, monkeypatch, tmp_path):
    """A checkpoint replaces the config's pre-trained weights, which would come from the network."""
    asked = []

    def offline(address, path):
        asked.append(address)
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    init = dict(type='Pretrained', checkpoint='https://example.invalid/weights.pth')
    options = case.options | {'model.init_cfg': init, 'model.backbone.init_cfg': init}
    config = Config.fromfile(case.config)
    config.merge_from_dict(options | dict(work_dir=str(tmp_path)))
    monkeypatch.setattr(launch, 'check_data', lambda *_: None)
    tested = launch.test_runner(copy.deepcopy(config), case.checkpoint).model
    for model in (case.model(cfg_options=options), tested):
        model.init_weights()  # what would ask for them
    assert not asked
    with pytest.raises(FastViTError, match='no network'):
        build(config.default_scope, config.model).init_weights()
    assert asked


def test_no_teacher():
    """A model from a distillation's config, without the network that taught it."""
    config = ROOT / 'configs/classification/fastvit_t8_dist_in1k.py'
    model = fastvit_mm.init_model(config)
    assert model.teacher is None
    assert type(model.backbone).__name__ == 'FastViT'


@pytest.mark.parametrize('task', [DETECTION])
@pytest.mark.parametrize('reparam', [False, True])
def test_by_mmdets_own_api(case, reparam):
    """A model of ours in mmdet's function, and one of mmdet's own making."""
    from mmdet.apis import inference_detector, init_detector

    model = case.model(reparam=reparam)
    ours = fastvit_mm.inference(model, str(case.path)).pred_instances
    theirs = [inference_detector(model, str(case.path)).pred_instances]
    if not reparam:
        built = init_detector(
            str(case.config), str(case.checkpoint), device='cpu', cfg_options=case.options
        )
        assert built.dataset_meta['classes'] == case.names
        theirs.append(inference_detector(built, str(case.path)).pred_instances)
    assert len(ours) == 5
    for instances in theirs:
        for key in ('scores', 'labels', 'bboxes', 'masks'):
            assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(instances[key])), key


@pytest.mark.parametrize('task', [SEGMENTATION])
def test_by_mmsegs_own_api(case):
    from mmseg.apis import inference_model

    model = case.model()
    ours = says(fastvit_mm.inference(model, case.image))
    assert torch.equal(says(inference_model(model, case.image)), ours)


@tasks
def test_built_once_and_quiet(case, capsys, monkeypatch):
    """The pipeline is built for the first image; nothing is printed, no rearranged weight lost."""
    model = case.model(reparam=True)
    first = says(fastvit_mm.inference(model, case.image))
    built = []
    original = Compose.__init__

    def note(self, steps):
        built.extend(s for s in steps or () if isinstance(s, dict))
        original(self, steps)

    monkeypatch.setattr(Compose, '__init__', note)
    parts = [m for m in model.modules() if isinstance(m, Deployed)]
    weights = [w for m in parts for r in m.rearranged.values() for w in r.by_order.values()]
    assert weights
    capsys.readouterr()
    assert torch.equal(says(fastvit_mm.inference(model, case.image)), first)
    kept = [w for m in parts for r in m.rearranged.values() for w in r.by_order.values()]
    assert all(a is b for a, b in zip(weights, kept, strict=True))
    assert not built
    assert capsys.readouterr() == ('', '')
    monkeypatch.undo()
    # copies and saved models have predictors of their own
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.mul_(0.5)
    assert not torch.equal(says(fastvit_mm.inference(twin, case.image)), first)
    assert torch.equal(says(fastvit_mm.inference(model, case.image)), first)
