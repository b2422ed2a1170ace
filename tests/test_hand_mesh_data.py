"""FreiHAND's files, the views of a hand, the demo's hands, their pictures."""

import json
import shutil
import time

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image
from scipy.spatial.transform import Rotation

from fastvit_mm import FastViTError
from fastvit_mm.hand_mesh import HandSample, demo_data, drawing, evaluate, read_hand_model
from fastvit_mm.hand_mesh.freihand import read_list
from fastvit_mm.hand_mesh.transforms import project

HAND = read_hand_model('synthetic')
SIZE = 64


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Six hands to train on, in four pictures each, and three to evaluate on."""
    folder = tmp_path_factory.mktemp('freihand')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_data.SPEC, 'hands', (6, 3))
        demo_data.make_freihand(folder)
    return folder


@pytest.fixture
def folder(drawn, tmp_path):
    """A copy to damage."""
    shutil.copytree(drawn, tmp_path / 'freihand')
    return tmp_path / 'freihand'


def dataset(folder, split='training', pipeline=()):
    settings = dict(type='FreiHAND', split=split, data_root=str(folder), pipeline=list(pipeline))
    return DATASETS.build(settings)


# --------------------------------------------------------------------------------------- data set


def test_samples_are_what_the_files_hold(drawn):
    for split, number, versions in (('training', 6, 4), ('evaluation', 3, 1)):
        data = dataset(drawn, split)
        assert len(data) == number * versions
        lists = {n: json.loads((drawn / f'{split}_{n}.json').read_text()) for n in ('K', 'xyz')}
        for index in (0, number - 1, len(data) - 1):
            info = data.get_data_info(index)
            assert info['img_path'].endswith(f'{split}/rgb/{index:08d}.jpg')
            for name, values in lists.items():
                np.testing.assert_allclose(info[name], values[index % number], atol=1e-7)
            assert info['verts'].shape == (778, 3)
            assert ('mano' in info) == (split == 'training')


def test_numbers_are_read_as_json_has_them(tmp_path):
    values = np.random.default_rng(0).normal(0, 1, (5, 21, 3))
    (tmp_path / 'a.json').write_text(json.dumps(values.tolist(), indent=1))
    np.testing.assert_array_equal(read_list(tmp_path / 'a.json', (21, 3)), values.astype('f4'))


def refused(folder, words, split='training'):
    with pytest.raises(FastViTError, match=words) as error:
        dataset(folder, split)
    assert '\n' not in str(error.value)


def test_lists_that_do_not_fit(folder):
    path = folder / 'training_xyz.json'
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values[:-1]))
    refused(folder, r"lists training_\*\.json in .* differ in length: \{'K': 6, 'xyz': 5")
    for depth in (-values[4][7][2], 0):
        values[4][7][2] = depth
        path.write_text(json.dumps(values))
        refused(folder, r'training_xyz\.json: sample 4 has points behind the camera')
    for text in ('[[1, 2]]', '[[NaN', '{"a": 1}', '', '\0\0'):
        path.write_text(text)
        refused(folder, r'training_xyz\.json (cannot be read|does not hold 21 x 3)')
    path.unlink()
    refused(folder, r'training_xyz\.json is missing')


def test_images_that_do_not_fit(folder):
    for number in range(12, 18):
        (folder / 'training' / 'rgb' / f'{number:08d}.jpg').unlink()
    refused(folder, r'lacks 6 of 6 images of version sample, such as 00000012\.jpg')
    image = folder / 'evaluation' / 'rgb' / '00000000.jpg'
    shutil.copy(image, image.with_name('00000003.jpg'))
    refused(folder, r'has 4 images, the lists 3', 'evaluation')
    with pytest.raises(FastViTError, match='split'):
        dataset(folder, 'val')


# ------------------------------------------------------------------------------------------ views

VIEW = dict(type='RandomHandView', rotation=90, rotation_prob=1, zoom=0.25, shift=0.1)


def run(steps, results, seed=0):
    np.random.seed(seed)
    for step in steps:
        results = TRANSFORMS.build(step)(results)
    return results


def blob(centre, shape):
    """A soft spot on black."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    gaps = (x - centre[0]) ** 2 + (y - centre[1]) ** 2
    return np.repeat(np.exp(-gaps / 18)[..., None] * 255, 3, 2).astype(np.uint8)


@pytest.mark.parametrize('seed', range(4))
def test_augmented_joints_lie_where_the_augmented_image_shows_them(drawn, seed):
    """Each joint of the original is marked; the mark is found where the new joint projects to."""
    info = dataset(drawn).get_data_info(seed)
    original = project(info['K'], info['xyz'])
    steps = [dict(type='FitHand', scale=96), VIEW, dict(type='PackHand')]
    found = 0
    for joint in range(21):
        results = {k: np.copy(info[k]) for k in ('K', 'xyz', 'verts')}
        packed = run(steps, dict(results, img=blob(original[joint], (SIZE, SIZE))), seed)
        sample = packed['data_samples']
        assert packed['inputs'].shape == (3, 96, 96)
        wanted = sample.uv[joint].numpy()
        if not ((wanted > 12) & (wanted < 84)).all():
            continue
        image = packed['inputs'][0].numpy().astype(float)
        y, x = np.mgrid[:96, :96]
        centre = [(x * image).sum() / image.sum(), (y * image).sum() / image.sum()]
        np.testing.assert_allclose(centre, wanted, atol=0.15)
        found += 1
    assert found > 8
    # the hand itself only turned, about the optical axis, and the mesh with the joints
    xyz, verts = sample.xyz.numpy(), sample.verts.numpy()
    turn, error = Rotation.align_vectors(xyz, info['xyz'])
    axis = turn.as_rotvec()
    assert error < 1e-5 and abs(axis[2]) > 0.05 and abs(axis[:2]).max() < 1e-4
    np.testing.assert_allclose(turn.apply(info['verts']), verts, atol=1e-5)


def test_photos_of_any_shape_are_shown_whole():
    image = np.zeros((60, 120, 3), np.uint8)
    image[::59, :] = 255
    image[:, ::119] = 255
    results = run([dict(type='FitHand', scale=96)], dict(img=image))
    assert results['img'].shape == (96, 96, 3)
    rows, columns = results['img'][..., 0].nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 71, 0, 95)
    square = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    same = run([dict(type='FitHand', scale=96)], dict(img=square.copy()))['img']
    np.testing.assert_array_equal(same, square)


def test_views_stay_within_their_limits():
    settings = dict(type='RandomHandView', rotation=10, rotation_prob=0.5, zoom=0.2, shift=0.1)
    angles, scales, shifts = [], [], []
    for seed in range(60):
        image = np.zeros((65, 65, 3), np.uint8)
        view = run([settings], dict(img=image), seed)['view']
        angles.append(np.degrees(np.arctan2(view[1, 0], view[0, 0])))
        scales.append(np.hypot(view[0, 0], view[1, 0]))
        shifts.append((view @ [32, 32, 1])[:2] - 32)
    turned = np.abs(angles)[np.abs(angles) > 1e-9]
    assert 15 < len(turned) < 45 and 5 < turned.max() <= 20
    assert 0.8 <= min(scales) < 0.85 and 1.15 < max(scales) <= 1.2
    assert 5 < np.abs(shifts).max() <= 6.5


def test_one_view_after_another():
    """The whole way from the photo is known, which predictions go back."""
    steps = [dict(type='FitHand', scale=96), VIEW]
    info = dict(img=np.zeros((40, 64, 3), np.uint8), K=np.eye(3))
    results = run(steps, info)
    point = np.array([10.0, 20, 1])
    angle = np.arctan2(results['view'][1, 0], results['view'][0, 0])
    # a camera of K = 1 sees the point itself, which the turn moved before the new one does
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ point
    np.testing.assert_allclose(results['K'] @ turned, results['view'] @ point, atol=1e-9)


def test_colours_change_by_channel():
    image = np.full((8, 8, 3), 100, np.uint8)
    changed = run([dict(type='RandomChannelNoise', noise=0.4)], dict(img=image))['img']
    factors = changed[0, 0] / 100
    assert len(set(factors)) == 3 and (abs(factors - 1) <= 0.41).all()
    bright = run([dict(type='RandomChannelNoise', noise=0.4)], dict(img=image * 2 + 55))['img']
    assert bright.max() == 255


def test_points_behind_the_camera_are_refused():
    with pytest.raises(FastViTError, match='behind the camera'):
        project(np.eye(3), np.array([[0.0, 0, 1], [0, 0, -1]]))


# ----------------------------------------------------------------------------- the demo's own data


def test_the_drawn_hands_fit_their_labels(drawn):
    """Vertices project onto the hand's pixels, joints are regressed, parameters give the mesh."""
    data = dataset(drawn)
    for index in range(6):
        info = data.get_data_info(index)
        uv = project(info['K'], info['verts'])
        assert uv.min() > 0 and uv.max() < SIZE - 1
        np.testing.assert_allclose(HAND.joint_regressor() @ info['verts'], info['xyz'], atol=1e-5)
        pose = info['mano'][0, :48].reshape(1, 16, 3).astype(float)
        pose[:, 1:] += HAND.hands_mean.reshape(15, 3)
        xyz, verts = demo_data.pose_hands(pose, info['mano'][:, 48:58].astype(float))
        again = info['xyz'] - info['xyz'][0] - (xyz - xyz[0, 0])
        assert abs(again).max() < 1e-4
        assert abs(info['verts'] - info['xyz'][0] - (verts[0] - xyz[0, 0])).max() < 1e-4
    versions = [cv2.imread(data.get_data_info(6 * v)['img_path']) for v in range(4)]
    assert versions[0].shape == (SIZE, SIZE, 3)
    assert all((versions[0] != other).mean() > 0.5 for other in versions[1:])


def test_the_data_are_the_same_each_time(drawn, tmp_path, monkeypatch):
    monkeypatch.setitem(demo_data.SPEC, 'hands', (6, 3))
    demo_data.write_freihand(tmp_path)
    for path in sorted(tmp_path.rglob('*.*')):
        assert path.read_bytes() == (drawn / path.relative_to(tmp_path)).read_bytes(), path


def test_a_hundred_pictures_take_seconds():
    rng = np.random.default_rng(0)
    xyz, verts = demo_data.pose_hands(*demo_data.draw_poses(rng, 20))
    begin = time.process_time()
    for pair in zip(xyz, verts, strict=True):
        K = demo_data.place_before_camera(rng, *pair, SIZE)
        demo_data.draw_hand(rng, K, pair[1], SIZE)
    assert time.process_time() - begin < 1


def test_the_zero_predictor_on_the_demo_data():
    """FreiHAND has 47.3 and 50.7 mm: hands of the same size."""
    xyz, verts = demo_data.pose_hands(*demo_data.draw_poses(np.random.default_rng(0), 50))
    found = evaluate(0 * xyz, 0 * verts, xyz, verts)
    assert found['PA-MPJPE'] == pytest.approx(45, abs=3)
    assert found['PA-MPVPE'] == pytest.approx(46, abs=3)
    assert found['F@5'] < 0.005 and found['F@15'] < 0.1


# --------------------------------------------------------------------------------------- pictures


def test_what_is_near_hides_what_is_far():
    """Two triangles facing the viewer, the red one nearer, and one that faces away."""
    corners = np.array([[10.0, 10], [10, 50], [50, 10]])
    points = np.concatenate([np.c_[corners, np.full(3, z)] for z in (2.0, 1.0, 0.5)])
    faces = np.array([[0, 1, 2], [3, 4, 5], [6, 8, 7]])
    a, b, c = (points[faces[:, i]] for i in range(3))
    assert np.sign(np.cross(b - a, c - a)[:, 2]).tolist() == [-1, -1, 1]
    colours = np.array([[255, 0, 0], [0, 0, 255], [0, 255, 0]])
    blank = np.full((64, 64, 3), 9, np.uint8)
    for order in ([0, 1, 2], [2, 1, 0]):
        picture = drawing.paint(blank, points, faces[order], colours[order])
        assert picture[20, 20].tolist() == [0, 0, 255]
        assert picture[50, 50].tolist() == [9, 9, 9]
    assert (blank == 9).all()


def test_the_overlay_covers_the_hand(drawn):
    """The fitted camera puts the mesh on the projected vertices."""
    info = dataset(drawn, 'evaluation').get_data_info(0)
    xyz, verts = (info[name] - info['xyz'][9] for name in ('xyz', 'verts'))
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)
    picture = drawing.overlay(blank, xyz, project(info['K'], info['xyz']), verts, HAND.f)
    uv = np.round(project(info['K'], info['verts'])).astype(int)
    covered = picture.max(2)[uv[:, 1], uv[:, 0]] > 0
    assert covered.mean() > 0.85 and (picture.max(2) > 0).mean() < 0.5


def test_the_picture_of_a_prediction(drawn):
    """The photo, the mesh on the hand's pixels, and the mesh from the side."""
    info = dataset(drawn, 'evaluation').get_data_info(1)
    xyz, verts = (info[name] - info['xyz'][9] for name in ('xyz', 'verts'))
    uv = project(info['K'], info['xyz'])
    values = dict(pred_xyz=xyz, pred_verts=verts, pred_uv=uv, faces=HAND.f)
    sample = HandSample(**{name: torch.tensor(value) for name, value in values.items()})
    picture = drawing.draw_hand(np.zeros((SIZE, SIZE, 3), np.uint8), sample)
    photo, over, side = np.split(picture.max(2), 3, axis=1)
    assert picture.shape == (512, 1536, 3) and not photo.any()
    rows, columns = over.nonzero()
    seen = (project(info['K'], info['verts']) + 0.5) * 512 / SIZE - 0.5
    edges = [*seen.min(0), *seen.max(0)]
    found = [columns.min(), rows.min(), columns.max(), rows.max()]
    np.testing.assert_allclose(found, edges, atol=12)  # a weak perspective, of a hand near by
    front = drawing.turntable(verts, HAND.f, 0).min(2)
    width = [np.ptp((view < 250).any(0).nonzero()[0]) for view in (side, front)]
    assert width[0] < 0.85 * width[1]


def test_the_turntable(tmp_path):
    front, side, back = (drawing.turntable(HAND.v_template, HAND.f, a) for a in (0, 1.571, 3.1416))
    width = [np.ptp((p < 250).any(2).any(0).nonzero()[0]) for p in (front, side, back)]
    assert width[1] < 0.5 * width[0] and abs(width[0] - width[2]) < 4
    drawing.write_gif(tmp_path / 'hand.gif', HAND.v_template, HAND.f, 6)
    with Image.open(tmp_path / 'hand.gif') as gif:
        assert gif.n_frames == 6 and gif.info['loop'] == 0
        red, _, blue = np.asarray(gif.convert('RGB'))[128, 128].astype(int)
        assert red > blue + 20  # skin
    with pytest.raises(FastViTError, match='cannot write'):
        drawing.write_gif(tmp_path / 'no' / 'hand.gif', HAND.v_template, HAND.f, 2)


def test_weak_perspective_recovers_a_camera():
    xyz = np.random.default_rng(0).normal(size=(21, 3))
    scale, shift = drawing.weak_perspective(xyz, 3 * xyz[:, :2] + [5, 7])
    assert scale == pytest.approx(3) and shift == pytest.approx([5, 7])
