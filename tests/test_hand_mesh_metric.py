"""FreiHAND's evaluation, held against an independent computation."""

import json

import numpy as np
import pytest
from mmengine.registry import METRICS
from mmengine.structures import BaseDataElement
from scipy.linalg import orthogonal_procrustes

from fastvit_mm import FastViTError
from fastvit_mm.hand_mesh import evaluate


def hands(number=4, seed=0, noise=0.004):
    """Truth and predictions that are off by ``noise`` metres, turned, scaled and moved."""
    rng = np.random.default_rng(seed)
    xyz, verts = rng.normal(0, 0.04, (number, 21, 3)), rng.normal(0, 0.04, (number, 778, 3))
    pred = []
    for truth in (xyz, verts):
        turn = np.linalg.qr(rng.normal(size=(number, 3, 3)))[0]
        wrong = truth + rng.normal(0, noise, truth.shape)
        pred.append(wrong @ turn * rng.uniform(0.5, 2) + rng.normal(size=(number, 1, 3)))
    return [*pred, xyz, verts]


def by_hand(points, truth):
    """The data set's alignment of one sample, by scipy, and the distances that remain."""
    centre = truth.mean(0)
    a, b = truth - centre, points - points.mean(0)
    size, a, b = np.linalg.norm(a), a / np.linalg.norm(a), b / np.linalg.norm(b)
    turn, scale = orthogonal_procrustes(a, b)
    aligned = b @ turn.T * scale * size + centre
    return aligned, np.sqrt(((aligned - truth) ** 2).sum(1))


def test_against_scipy_and_brute_force():
    pred_xyz, pred_verts, xyz, verts = hands()
    found = evaluate(pred_xyz, pred_verts, xyz, verts)
    joints = [by_hand(*pair)[1] for pair in zip(pred_xyz, xyz, strict=True)]
    meshes = [by_hand(*pair) for pair in zip(pred_verts, verts, strict=True)]
    assert found['PA-MPJPE'] == pytest.approx(1000 * np.mean(joints), rel=1e-5)
    assert found['PA-MPVPE'] == pytest.approx(1000 * np.mean([m[1] for m in meshes]), rel=1e-5)
    levels = np.linspace(0, 0.05, 100)
    for key, errors in (('AUC_J', joints), ('AUC_V', [m[1] for m in meshes])):
        curve = [(np.concatenate(errors) <= level).mean() for level in levels]
        assert found[key] == pytest.approx(np.trapezoid(curve, levels) / 0.05)
    for key, limit in (('F@5', 0.005), ('F@15', 0.015)):
        scores = []
        for (aligned, _), truth in zip(meshes, verts, strict=True):
            gaps = np.linalg.norm(aligned[:, None] - truth[None], axis=-1)
            p, r = (gaps.min(1) < limit).mean(), (gaps.min(0) < limit).mean()
            scores.append(2 * p * r / (p + r))
        assert found[key] == pytest.approx(np.mean(scores))
    assert 3 < found['PA-MPJPE'] < 10 and 0.1 < found['F@5'] < 1 and 0.5 < found['AUC_J'] < 0.99


def test_joints_and_vertices_are_aligned_separately():
    """Joints of another size and place than the mesh cost nothing."""
    _, _, xyz, verts = hands()
    found = evaluate(3 * xyz + 1, verts, xyz, verts)
    assert found['PA-MPJPE'] < 1e-3 and found['PA-MPVPE'] < 1e-3


def test_a_mirror_image_scores_zero():
    _, _, xyz, verts = hands()
    mirror = np.array([-1, 1, 1])
    found = evaluate(xyz * mirror, verts * mirror, xyz, verts)
    assert found['PA-MPJPE'] < 1e-3 and found['PA-MPVPE'] < 1e-3 and found['F@5'] == 1


def test_the_zero_predictor():
    """Everything ends in the centre: the error is the mean distance from it."""
    _, _, xyz, verts = hands()
    found = evaluate(0 * xyz, 0 * verts, xyz, verts)
    for key, truth in (('PA-MPJPE', xyz), ('PA-MPVPE', verts)):
        spread = np.linalg.norm(truth - truth.mean(1, keepdims=True), axis=-1).mean()
        assert found[key] == pytest.approx(1000 * spread, rel=1e-5)


def test_f_is_strict_and_auc_is_not():
    """FreiHAND: a distance of exactly the threshold is no hit for F, and one for the AUC."""
    from fastvit_mm.hand_mesh.metric import area_under_curve, f_scores

    plane = np.stack(np.meshgrid([0.0], np.arange(3.0), np.arange(3.0)), -1).reshape(-1, 3)
    for distance, wanted in ((0.015, [0, 0]), (0.0149, [0, 1]), (0.005, [0, 1]), (0.004, [1, 1])):
        assert f_scores(plane, plane + np.array([distance, 0, 0])) == wanted
    assert area_under_curve(np.zeros(5)) == 1
    assert area_under_curve(np.full(5, 0.05)) == pytest.approx(0.5 / 99)


@pytest.mark.parametrize('index', range(4))
def test_what_cannot_be_evaluated(index):
    name = ('pred_xyz', 'pred_verts', 'xyz', 'verts')[index]
    for change in (lambda a: a[:, :5], lambda a: a[1:], lambda a: a * np.nan):
        given = hands()
        given[index] = change(given[index])
        with pytest.raises(FastViTError, match=r'shape|not finite') as error:
            evaluate(*given)
        assert '\n' not in str(error.value)
        assert name in str(error.value) or 'expected' in str(error.value)
    with pytest.raises(FastViTError, match='no samples'):
        evaluate([], [], [], [])


def test_the_registered_metric(tmp_path):
    import torch

    given = hands(5)
    metric = METRICS.build(dict(type='HandMeshMetric', pred_file=str(tmp_path / 'pred.json')))
    for sample in zip(*given, strict=True):
        names = ('pred_xyz', 'pred_verts', 'xyz', 'verts')
        values = (torch.from_numpy(a) for a in sample)
        element = BaseDataElement(**dict(zip(names, values, strict=True)))
        metric.process({}, [element.to_dict()])
    assert metric.evaluate(5) == pytest.approx(evaluate(*given))
    xyz, verts = json.loads((tmp_path / 'pred.json').read_text())
    np.testing.assert_allclose(xyz, given[0], atol=1e-6)
    np.testing.assert_allclose(verts, given[1], atol=1e-6)
    with pytest.raises(FastViTError, match='folder'):
        METRICS.build(dict(type='HandMeshMetric', pred_file=str(tmp_path / 'no' / 'pred.json')))
