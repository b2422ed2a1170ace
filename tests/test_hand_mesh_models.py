"""Both heads: what they compute, learn, export and draw."""

import copy
import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from randomize import randomize, relative
from test_hand_mesh_data import run
from test_hand_mesh_hand_model import Hostile, mano_content, write
from test_tools import load_tool, refusal

import fastvit_mm
from fastvit_mm import FastViTError, launch, pictures, reparameterize
from fastvit_mm.export import Session, attach, export, verify
from fastvit_mm.hand_mesh import HandSample, demo_data, read_hand_model
from fastvit_mm.hand_mesh.hand_model import matrices_of_axis_angle
from fastvit_mm.hand_mesh.heads import sample_at

ROOT = Path(__file__).parent.parent
HAND = read_hand_model('synthetic')
ARCH = dict(depths=(1, 1, 1, 1), widths=(8, 16, 32, 32), ffn_ratio=2)
HEADS = ('mano', 'vertices')
heads = pytest.mark.parametrize('name', HEADS)
DRAWN = 64  # pixels


def config_of(name: str, hand_model='synthetic') -> Config:
    cfg = Config.fromfile(ROOT / f'configs/hand_mesh/{name}_fastvit_t8_freihand.py')
    cfg.model.backbone.arch = dict(ARCH)
    cfg.model.neck.in_channels, cfg.model.head.in_channels = 32, 64
    cfg.model.head.hand_model, cfg.model.init_cfg = hand_model, None
    return cfg


def build(name: str, seed=0):
    """A model with random weights and statistics, ready to predict."""
    torch.manual_seed(seed)
    model = MODELS.build(config_of(name).model)
    head = {k: v.clone() for k, v in model.head.state_dict().items()}
    randomize(model, seed)
    model.head.load_state_dict(head)  # from where it starts, a little off
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.head.read_hand_model()
    return model.eval()


@pytest.fixture(scope='module')
def hands():
    """Four samples as the pipeline packs them, with their parameters."""
    rng = np.random.default_rng(0)
    poses, shapes = demo_data.draw_poses(rng, 4)
    batch = dict(inputs=[], data_samples=[])
    for i, (xyz, verts) in enumerate(zip(*demo_data.pose_hands(poses, shapes), strict=True)):
        K = demo_data.place_before_camera(rng, xyz, verts, DRAWN)
        image = demo_data.draw_hand(rng, K, verts, DRAWN)[..., ::-1]
        mano = np.zeros((1, 61))
        mano[0, :48] = poses[i].ravel() - np.concatenate([np.zeros(3), HAND.hands_mean])
        mano[0, 48:58] = shapes[i]
        given = dict(img=np.ascontiguousarray(image), K=K, xyz=xyz, verts=verts, mano=mano)
        packed = run([dict(type='PackHand')], given)
        for key, values in batch.items():
            values.append(packed[key])
    return batch


def copied(batch) -> dict:
    return copy.deepcopy(batch)


# --------------------------------------------------------------------------------------- training


@heads
def test_every_parameter_learns(name, hands):
    model = build(name).train()
    losses = model(**model.data_preprocessor(copied(hands), True), mode='loss')
    total, logged = model.parse_losses(losses)
    assert torch.isfinite(total) and len(logged) == 1 + len(model.head.weights)
    total.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # the last token stage's gamma and the like all count
    assert not dead


@heads
def test_a_few_steps_on_one_batch_learn_it(name, hands):
    torch.manual_seed(0)
    model = build(name).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        data = model.data_preprocessor(copied(hands), True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_the_true_parameters_cost_nothing(hands):
    """The layer, the root, the mean pose and the targets agree with how the data were made."""
    model = build('mano')
    head = model.head
    samples = hands['data_samples']
    mano = torch.stack([s.mano for s in samples])
    rotations = matrices_of_axis_angle(mano[:, :48].view(4, 16, 3) + head.mean_pose)
    camera = torch.zeros(4, 3)
    head.parameters_of = lambda feats: (camera, rotations, mano[:, 48:58])
    losses = head.loss(None, samples)
    assert losses['loss_xyz'] < 1e-9 and losses['loss_verts'] < 1e-5
    assert losses['loss_pose'] < 1e-9 and losses['loss_shape'] < 1e-9
    assert losses['loss_points'] > 1e-3  # nobody told the camera
    best = np.inf
    for scale in np.linspace(0, 1, 21):
        camera[:, 0] = scale
        hand = head.hand_of(camera, rotations, mano[:, 48:58])
        camera[:, 1:] = (head.targets(samples).points - hand.points).mean(1) + camera[:, 1:]
        best = min(best, float(head.loss(None, samples)['loss_points']))
    assert best < 5e-3


def test_losses_by_hand(hands):
    samples = hands['data_samples']
    model = build('vertices')
    feats = model.extract_feat(torch.randn(4, 3, 64, 64))
    hand, losses = model.head(feats), model.head.loss(feats, samples)
    xyz = torch.stack([s.xyz for s in samples])
    verts = torch.stack([s.verts for s in samples]) - xyz[:, 9:10]
    points = 2 * (torch.stack([s.uv for s in samples]) + 0.5) / DRAWN - 1
    wanted = dict(verts=10 * F.l1_loss(hand.verts, verts), points=F.l1_loss(hand.points, points))
    wanted['xyz'] = 10 * F.l1_loss(hand.xyz, xyz - xyz[:, 9:10])
    for key, value in wanted.items():
        torch.testing.assert_close(losses[f'loss_{key}'], value)
    regressor = torch.tensor(HAND.joint_regressor()).float()
    torch.testing.assert_close(hand.xyz, regressor @ hand.verts)


def test_the_wrist_is_learned_from_the_points_alone(hands):
    """FreiHAND's wrist rotation is not quite in the camera's frame."""
    model = build('mano')
    batch = copied(hands)
    for sample in batch['data_samples']:
        sample.mano[:3] += 1
    feats = model.extract_feat(torch.randn(4, 3, 64, 64))
    one, other = (model.head.loss(feats, b['data_samples']) for b in (hands, batch))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_predictions_are_in_pixels(hands):
    model = build('vertices')
    data = model.data_preprocessor(copied(hands), False)
    hand = model(data['inputs'])
    for i, sample in enumerate(model(**data, mode='predict')):
        assert sample.img_shape == (DRAWN, DRAWN)
        torch.testing.assert_close(sample.pred_uv, (hand.points[i] + 1) * DRAWN / 2 - 0.5)
        torch.testing.assert_close(sample.pred_verts, hand.verts[i])
        torch.testing.assert_close(sample.pred_xyz, hand.xyz[i])
    targets = model.head.targets(data['data_samples'])
    back = (targets.points + 1) * DRAWN / 2 - 0.5
    torch.testing.assert_close(back, torch.stack([s.uv for s in data['data_samples']]))


def test_images_need_not_be_square(hands):
    head = build('vertices').head
    sample = HandSample(metainfo=dict(img_shape=(48, 64)))
    for name in ('verts', 'xyz'):
        sample.set_data({name: hands['data_samples'][0].get(name)})
    sample.uv = torch.tensor([63.5, 47.5]).expand(21, 2)  # the lower right corner
    assert torch.equal(head.targets([sample]).points, torch.ones(1, 21, 2))
    head.forward = lambda feats: head.targets([sample])
    found = head.predict(None, [sample])[0]
    assert torch.equal(found.pred_uv, sample.uv)


def test_the_paper_head_starts_from_the_mean_pose():
    torch.manual_seed(0)
    head = MODELS.build(config_of('mano').model).head
    camera, rotations, shape = head.parameters_of((torch.zeros(1, 64),))
    mean = torch.tensor(HAND.hands_mean).float().view(15, 3)
    assert not camera.any() and not shape.any()
    torch.testing.assert_close(rotations[0, 0], torch.eye(3))
    torch.testing.assert_close(rotations[0, 1:], matrices_of_axis_angle(mean))


def test_features_are_sampled_where_the_points_are():
    """[-1, 1] ends at the edges of the outer pixels, as in the targets; the border goes on."""
    features = torch.randn(1, 2, 4, 8)
    rows, columns = torch.tensor([0, 1, 3, 3]), torch.tensor([0, 5, 7, 2])
    points = torch.stack([(columns + 0.5) / 4 - 1, (rows + 0.5) / 2 - 1], -1)
    sampled = sample_at(features, points[None, :, None])
    torch.testing.assert_close(sampled[0].T, features[0][:, rows, columns])
    outside = sample_at(features, torch.tensor([[[[3.0, -3.0]]]]))
    torch.testing.assert_close(outside[0, 0], features[0][:, 0, 7])


# ------------------------------------------------------------------------------- with no hand model


def test_the_paper_head_needs_a_hand_model():
    with pytest.raises(FastViTError, match='does not exist'):
        MODELS.build(config_of('mano', 'no/MANO_RIGHT.pkl').model)


def test_the_vertex_head_needs_one_for_training_alone(hands, tmp_path):
    trained = build('vertices')
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'trained.pth')
    model = MODELS.build(config_of('vertices', 'no/MANO_RIGHT.pkl').model).eval()
    data = model.data_preprocessor(copied(hands), False)
    with pytest.raises(FastViTError, match='never trained'):
        model(**data, mode='predict')
    with pytest.raises(FastViTError, match='does not exist'):
        model.init_weights()
    fastvit_mm.weights.load(model, tmp_path / 'trained.pth', whole=True)
    wanted = trained(data['inputs'])
    for got, value in zip(model(data['inputs']), wanted, strict=True):
        assert torch.equal(got, value)
    assert torch.equal(model.head.faces, torch.tensor(HAND.f))


@heads
def test_starts_from_a_classifier(name, tmp_path):
    """Backbone and neck are the file's, the head stays, its hand model is read."""
    state = {k: v for k, v in build(name, 1).state_dict().items() if not k.startswith('head.')}
    others = {'head.fc.weight': torch.randn(1000, 64), 'head.fc.bias': torch.randn(1000)}
    torch.save(dict(state_dict={**state, **others}), tmp_path / 'classifier.pth')
    cfg = config_of(name)
    cfg.model.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'))
    model = MODELS.build(cfg.model)
    model.init_weights()
    loaded = model.state_dict()
    assert state.keys() <= loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert model.head.faces.any()


def test_checkpoints_of_the_paper_head_have_nothing_of_mano():
    shapes = [v.shape for k, v in build('mano').head.state_dict().items()]
    assert shapes == [(109, 64), (109,)]


# ------------------------------------------------------------------------------------- deploy form


@heads
def test_the_deploy_form_is_the_same_function(name):
    model = build(name)
    merged = reparameterize(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for got, wanted in zip(merged(x), model(x), strict=True):
            assert relative(got, wanted) < 1e-4
    assert len(merged.state_dict()) < len(model.state_dict())


IMAGES = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8) for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['.onnx', '.pt2', '.xml'])
@pytest.mark.parametrize(
    ('name', 'output'), [('vertices', None), ('mano', None), ('mano', 'vertices')]
)
def test_exported_files(name, output, suffix, tmp_path):
    """One verified file whose every output is the model's, and which answers in its place."""
    model, path = build(name), tmp_path / f'hand{suffix}'
    form = {'.onnx': 'onnx', '.pt2': 'torch', '.xml': 'openvino'}[suffix]
    info = export(model, path, form, size=(64, 64), output=output, dynamic=suffix == '.onnx')
    verdict = verify(model, path, IMAGES)
    assert verdict.explained, verdict.text
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        out, hand = Session(path)(x), model(x)
    if name == 'mano' and output is None:
        assert info['outputs'] == ['rotations', 'shape', 'camera']
        hand = model.head.parameters_of(model.extract_feat(x))
        hand = dict(zip(('camera', 'rotations', 'shape'), hand, strict=True))
        # none of the hand model's arrays: the blend shapes of the pose alone are 1.2 MB
        assert path.with_suffix('.bin' if suffix == '.xml' else suffix).stat().st_size < 600_000
    else:
        assert info['outputs'] == ['vertices', 'joints', 'points']
        hand = dict(zip(info['outputs'], hand, strict=True))
    for key, value in hand.items():
        assert relative(out[key], value) < 1e-4, key
    wanted = model(x)
    answered = attach(copy.deepcopy(model), path)
    for got, value in zip(answered(x), wanted, strict=True):
        assert relative(got, value) < 1e-4
    if name == 'vertices':  # without weights and hand model
        bare = attach(MODELS.build(config_of(name, 'no.pkl').model).eval(), path)
        data = dict(inputs=[torch.from_numpy(IMAGES[0].transpose(2, 0, 1))])
        data['data_samples'] = [HandSample(metainfo=dict(img_shape=(64, 64)))]
        seen, answer = (m.test_step(copy.deepcopy(data))[0] for m in (model, bare))
        assert relative(answer.pred_verts, seen.pred_verts) < 1e-4
        answer.faces = bare.head.faces
        with pytest.raises(FastViTError, match='triangles'):
            pictures.draw(IMAGES[0], answer, {})
    other = build('mano' if name == 'vertices' else 'vertices')
    with pytest.raises(FastViTError, match='the config has a'):
        attach(other, path)


@pytest.mark.slow
@heads
def test_core_ml(name, tmp_path):
    model, path = build(name), tmp_path / 'hand.mlpackage'
    export(model, path, 'coreml', size=(64, 64), output='vertices' if name == 'mano' else None)
    verdict = verify(model, path, IMAGES)
    assert verdict.explained, verdict.text


# ---------------------------------------------------------------------------------------- inference


@heads
def test_inference_and_its_picture(name, tmp_path):
    cfg = config_of(name)
    torch.save(dict(state_dict=build(name).state_dict()), tmp_path / 'hand.pth')
    model = fastvit_mm.init_model(cfg, tmp_path / 'hand.pth')
    photo = np.random.default_rng(0).integers(0, 256, (60, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'photo.png'), photo)
    samples = fastvit_mm.inference(model, [photo, tmp_path / 'photo.png'])
    torch.testing.assert_close(samples[0].pred_verts, samples[1].pred_verts)
    other = np.random.default_rng(1).integers(0, 256, (90, 80, 3), np.uint8)
    several = fastvit_mm.inference(model, [other, photo, other[:50]], batch_size=2)
    alone = fastvit_mm.inference(model, other)
    assert relative(several[0].pred_uv, alone.pred_uv) < 1e-4
    assert relative(several[1].pred_uv, samples[0].pred_uv) < 1e-4
    assert relative(samples[0].pred_uv, alone.pred_uv) > 1e-2, 'it tells the photos apart'
    # points of the square that the network saw, in the photo: 120 pixels are 224, 30 are added
    fitted = run([dict(type='FitHand', scale=224)], dict(img=photo))['img']
    square = fastvit_mm.inference(model, fitted)
    uv = (square.pred_uv + 0.5) * 120 / 224 - 0.5 - torch.tensor([0, 30])
    torch.testing.assert_close(samples[0].pred_uv, uv, atol=2e-2, rtol=0)
    picture = pictures.draw(photo, samples[0], {})
    assert picture.shape[0] == 512 and picture.shape[1] > 2 * 1024
    same = pictures.draw(photo, samples[0], {}, same_size=True)
    assert same.shape == photo.shape and (same != photo).any()
    with pytest.raises(FastViTError, match='does not exist'):
        fastvit_mm.inference(model, tmp_path / 'no.png')
    start = (tmp_path / 'photo.png').read_bytes()[:100]
    for content, wrong in ((b'', 'empty'), (b'text', 'no image'), (start, 'truncated')):
        (tmp_path / 'broken.png').write_bytes(content)
        with pytest.raises(FastViTError, match=rf'^{tmp_path}/broken\.png is {wrong}'):
            fastvit_mm.inference(model, tmp_path / 'broken.png')
    deployed = fastvit_mm.init_model(cfg, tmp_path / 'hand.pth', reparam=True)
    found = fastvit_mm.inference(deployed, photo)
    assert relative(found.pred_verts, samples[0].pred_verts) < 1e-3


# ------------------------------------------------------------------------------------------- tools


@pytest.mark.slow
@heads
def test_the_tools(name, tmp_path, monkeypatch, capfd):
    """Train, test in both forms, draw and export, each by its tool, on a few demo hands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(demo_data.SPEC, 'hands', (8, 3))
    config_of(name).dump('small.py')
    path = 'small.py'
    work = ['--demo', '--work-dir', 'run']
    length = 'max_epochs=1' if name == 'mano' else 'max_iters=2'
    short = [f'train_cfg.{length}', 'train_cfg.val_interval=1']
    load_tool('train').main([path, *work, '--cfg-options', *short])
    checkpoint = Path('run/last_checkpoint').read_text().strip()
    results = []
    for more in ([], ['--reparam']):
        load_tool('test').main([path, checkpoint, *work, *more, '--out', 'm.json'])
        results.append(Config.fromfile('m.json').to_dict())
    assert results[0]['PA-MPJPE'] == pytest.approx(results[1]['PA-MPJPE'], rel=1e-3)
    assert 1 < results[0]['PA-MPVPE'] < 60  # 46 mm: all vertices in one place
    load_tool('test').main([path, checkpoint, *work, '--show-dir', 'shown'])
    with open('shown/images.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['picture'] for row in rows] == sorted(p.name for p in Path('shown').glob('*.jpg'))
    errors = [float(row['PA-MPJPE']) for row in rows]
    assert len(errors) == 3 and errors == sorted(errors, reverse=True)
    assert np.mean(errors) == pytest.approx(results[0]['PA-MPJPE'], rel=1e-3)
    with open('shown/classes.csv', newline='') as file:
        joints = list(csv.DictReader(file))
    assert [joints[i]['joint'] for i in (0, 4, 9)] == ['wrist', 'thumb 4', 'middle 1']
    assert np.mean([float(row['mean (mm)']) for row in joints]) == pytest.approx(
        np.mean(errors), abs=0.01
    )
    photos = 'data/demo/freihand/evaluation/rgb'
    load_tool('infer').main(
        [path, checkpoint, photos, '--demo', '--out', 'out', '--json', '--turntable']
    )
    assert len(list(Path('out').glob('*.jpg'))) == len(list(Path('out').glob('*.gif'))) == 3
    found = json.loads(Path('out/rgb.predictions.json').read_text())
    assert [np.shape(one['verts']) for one in found] == [(778, 3)] * 3
    with Image.open('out/00000000.gif') as gif:
        assert gif.n_frames > 20
    Path('broken.png').write_bytes(b'no image')
    with pytest.raises(SystemExit, match='1'):
        load_tool('infer').main([path, checkpoint, 'broken.png', '--demo', '--out', 'none'])
    assert 'broken.png: cannot be read, skipped' in capfd.readouterr().err
    with pytest.raises(FastViTError, match=r'no\.png does not exist'):
        load_tool('infer').main([path, checkpoint, 'no.png', '--demo', '--out', 'none'])
    given = ['--with-hand-model'] if name == 'mano' else []
    load_tool('export').main([path, checkpoint, '--demo', '--out', 'h.onnx', *given])
    assert 'vertices, joints, points' in capfd.readouterr().out
    load_tool('test').main([path, 'h.onnx', *work, '--out', 'm.json'])
    again = Config.fromfile('m.json').to_dict()
    assert again['PA-MPJPE'] == pytest.approx(results[0]['PA-MPJPE'], rel=1e-3)


def no_hand_model(data):
    return 'no.pkl', 'does not exist'


def hostile_hand_model(data):
    write(Path('bad.pkl'), mano_content(extra=Hostile(Path.touch, Path('mark'))))
    return 'bad.pkl', 'no hand model does'


def body_model(data):
    write(Path('smpl.pkl'), mano_content(v_template=np.zeros((6890, 3))))
    return 'smpl.pkl', 'v_template is (6890, 3)'


def too_few_labels(data):
    for path in data.glob('training_*.json'):
        path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    return 'synthetic', '32 images, the lists 28'


def unequal_lists(data):
    path = data / 'training_verts.json'
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    return 'synthetic', "'verts': 7"


def no_last_version(data):
    for number in range(24, 32):
        (data / f'training/rgb/{number:08d}.jpg').unlink()
    return 'synthetic', 'lacks 8 of 8 images of version auto'


def behind_the_camera(data):
    path = data / 'training_xyz.json'
    values = np.array(json.loads(path.read_text()))
    values[3, 5, 2] = -0.1
    path.write_text(json.dumps(values.tolist()))
    return 'synthetic', 'sample 3 has points behind the camera'


BAD = [no_hand_model, hostile_hand_model, body_model]
BAD += [too_few_labels, unequal_lists, no_last_version, behind_the_camera]


@pytest.mark.parametrize('damage', BAD)
def test_bad_input_is_one_line_of_the_tools(damage, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(demo_data.SPEC, 'hands', (8, 2))
    data = Path('data/demo/freihand')
    demo_data.make_freihand(data)
    hand_model, words = damage(data)
    for name in HEADS:
        config_of(name).dump('small.py')
        args = ['small.py', '--demo', '--cfg-options', f'model.head.hand_model={hand_model}']
        with pytest.raises(SystemExit) as end:
            launch.run(lambda _, args=args: load_tool('train').main(args))
        refusal((end.value.code, capfd.readouterr().err.strip()), words)
    assert not Path('mark').exists()
