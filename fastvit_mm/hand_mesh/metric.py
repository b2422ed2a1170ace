"""FreiHAND's own evaluation: errors of joints and vertices after Procrustes alignment."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from scipy.spatial import KDTree

from fastvit_mm.errors import FastViTError

JOINTS, VERTICES = 21, 778
THRESHOLDS = np.linspace(0, 0.05, 100)  # metres, of the AUC
F_AT = (0.005, 0.015)  # metres
TINY = 1e-8  # metres: keeps a prediction of a single point from dividing by zero


def align(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """``points`` (N, P, 3), each sample moved, scaled and turned (a mirror image too) to lie on
    ``target`` (N, P, 3) as well as least squares can."""
    means = [p.mean(1, keepdims=True) for p in (points, target)]
    points, target = points - means[0], target - means[1]
    sizes = [np.linalg.norm(p, axis=(1, 2), keepdims=True) + TINY for p in (points, target)]
    points, target = points / sizes[0], target / sizes[1]
    u, spread, v = np.linalg.svd(points.transpose(0, 2, 1) @ target)
    return points @ (u @ v) * spread.sum(1)[:, None, None] * sizes[1] + means[1]


def area_under_curve(errors: np.ndarray) -> float:
    """Share of ``errors`` within a threshold, averaged over thresholds from 0 to 50 mm."""
    shares = [np.mean(errors <= threshold) for threshold in THRESHOLDS]
    return float(np.mean(np.add(shares[:-1], shares[1:]) / 2))


def f_scores(points: np.ndarray, target: np.ndarray) -> list[float]:
    """Harmonic mean of precision and recall at each of :data:`F_AT`, of one sample, (P, 3)."""
    precise, recalled = KDTree(target).query(points)[0], KDTree(points).query(target)[0]
    scores = []
    for threshold in F_AT:
        p, r = np.mean(precise < threshold), np.mean(recalled < threshold)
        scores.append(float(2 * p * r / (p + r)) if p + r else 0.0)
    return scores


def checked(name: str, points, shape: tuple[int, ...]) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if points.ndim != 3 or points.shape[1:] != shape[1:] or len(points) != shape[0]:
        raise FastViTError(f'{name} has the shape {points.shape}, expected {shape}')
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any((1, 2)).sum())
        raise FastViTError(f'{name} is not finite in {bad} of {len(points)} samples')
    return points


def evaluate(pred_xyz, pred_verts, xyz, verts) -> dict[str, float]:
    """Compare predictions with the truth as FreiHAND's evaluation does.

    Joints and vertices are aligned separately. A mirror image counts as correct.

    Args:
        pred_xyz, xyz: joints (N, 21, 3), metres.
        pred_verts, verts: vertices (N, 778, 3), metres.

    Returns:
        ``PA-MPJPE`` and ``PA-MPVPE`` in mm; ``AUC_J`` and ``AUC_V`` (0 to 50 mm), ``F@5`` and
        ``F@15`` (mm, of the vertices) from 0 to 1.

    Raises:
        FastViTError: another shape, no samples, or values that are not finite.
    """
    number = len(xyz)
    if not number:
        raise FastViTError('there are no samples to evaluate')
    joints, mesh = (number, JOINTS, 3), (number, VERTICES, 3)
    pred_xyz, xyz = checked('pred_xyz', pred_xyz, joints), checked('xyz', xyz, joints)
    pred_verts, verts = checked('pred_verts', pred_verts, mesh), checked('verts', verts, mesh)
    aligned = align(pred_verts, verts)
    of_joints = np.linalg.norm(align(pred_xyz, xyz) - xyz, axis=-1)
    of_verts = np.linalg.norm(aligned - verts, axis=-1)
    f5, f15 = np.mean([f_scores(*pair) for pair in zip(aligned, verts, strict=True)], axis=0)
    return {
        'PA-MPJPE': 1000 * float(of_joints.mean()),
        'PA-MPVPE': 1000 * float(of_verts.mean()),
        'AUC_J': area_under_curve(of_joints),
        'AUC_V': area_under_curve(of_verts),
        'F@5': float(f5),
        'F@15': float(f15),
    }


@METRICS.register_module()
class HandMeshMetric(BaseMetric):
    """:func:`evaluate` over a data set, and the challenge's prediction file.

    Args:
        pred_file: where to write ``[xyz, verts]`` of all samples in their order, as the FreiHAND
            challenge takes it; None for nowhere.
    """

    default_prefix = None

    def __init__(self, pred_file: str | None = None, collect_device: str = 'cpu'):
        super().__init__(collect_device)
        self.pred_file = Path(pred_file) if pred_file else None
        if self.pred_file and not self.pred_file.parent.is_dir():
            raise FastViTError(f'pred_file {pred_file}: its folder does not exist')

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        keys = ('pred_xyz', 'pred_verts', 'xyz', 'verts')
        self.results += [
            {key: sample[key].cpu().numpy() for key in keys if key in sample}
            for sample in data_samples
        ]

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        columns = {key: [one[key] for one in results] for key in results[0]}
        metrics = evaluate(**columns)
        if self.pred_file:
            both = [np.round(columns[key], 6).tolist() for key in ('pred_xyz', 'pred_verts')]
            new = self.pred_file.with_name(f'.{self.pred_file.name}.new')
            new.write_text(json.dumps(both))
            new.replace(self.pred_file)
        return metrics
