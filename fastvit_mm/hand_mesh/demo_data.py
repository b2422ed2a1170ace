"""Generated hands on noisy backgrounds, written in FreiHAND's layout."""

import json
from pathlib import Path

import numpy as np
import torch

from fastvit_mm.demo.scenes import draw_once, save, texture

from .drawing import paint, shades
from .freihand import VERSIONS
from .hand_model import MIDDLE, HandLayer, matrices_of_axis_angle
from .synthetic_hand import BENDS, FIRST_JOINT, flexion_axis, synthetic_hand

VERSION = 1  # raise it when the pictures change
SPEC = dict(hands=(2400, 120), size=64)  # to train on, each in four pictures; to evaluate on
FOCAL = 2.1  # in image sizes


def draw_poses(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Axis-angle poses (number, 16, 3), the wrist's among them, and shapes (number, 10)."""
    poses = np.zeros((number, 16, 3))
    poses[:, 0] = rng.normal(0, 0.2, (number, 3))
    curl = rng.uniform(0, 1, number)
    curls = {finger: curl + rng.normal(0, 0.25, number) for finger in FIRST_JOINT}
    curls['middle'] = (curls['index'] + curls['ring']) / 2
    for finger, first in FIRST_JOINT.items():
        own = np.clip(curls[finger], -0.1, 1)
        reach = (0.5, 0.7, 0.7) if finger == 'thumb' else (1.2, 1.5, 0.9)
        for bone in range(len(BENDS)):
            poses[:, first + bone] = np.outer(own * reach[bone], flexion_axis(finger))
        if finger != 'thumb':  # spread, about the axis out of the palm
            poses[:, first, 2] += rng.normal(0, 0.12, number)
    return poses, rng.normal(0, 0.6, (number, 10))


def pose_hands(poses: np.ndarray, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joints (N, 21, 3) and vertices (N, 778, 3), metres."""
    layer = HandLayer(synthetic_hand()).double()
    with torch.no_grad():
        verts = layer(matrices_of_axis_angle(torch.tensor(poses)), torch.tensor(shapes))
        return layer.joints(verts).numpy(), verts.numpy()


def place_before_camera(rng, xyz: np.ndarray, verts: np.ndarray, size: int) -> np.ndarray:
    """Move one hand, in place, to where all of it is seen; returns the camera's K (3, 3)."""
    K = np.array([[FOCAL * size, 0, (size - 1) / 2], [0, FOCAL * size, (size - 1) / 2], [0, 0, 1]])
    middle = (verts.min(0) + verts.max(0)) / 2
    spread = np.abs(verts - middle)[:, :2].max()
    away = FOCAL * spread / rng.uniform(0.34, 0.39)
    shift = np.array([*rng.uniform(-0.03, 0.03, 2) * away / FOCAL, away]) - middle
    xyz += shift
    verts += shift
    return K


def draw_hand(rng: np.random.Generator, K: np.ndarray, verts: np.ndarray, size: int) -> np.ndarray:
    """One picture, RGB uint8: a hand, lit from in front, on a random background."""
    ground = texture(rng, size, size, rng.uniform(20, 235, 3), 60)
    image = (ground + rng.normal(0, 6, ground.shape)).clip(0, 255).astype(np.uint8)
    pixels = verts @ K.T
    points = np.concatenate([pixels[:, :2] / pixels[:, 2:], verts[:, 2:]], 1)
    light = np.array([*rng.uniform(-1, 1, 2), -1.0])
    skin = np.array([225, 170, 140]) * rng.uniform(0.55, 1.1) + rng.uniform(-15, 15, 3)
    faces = synthetic_hand().f
    colours = shades(verts, faces, light, rng.uniform(0.25, 0.5))[:, None] * skin
    image = paint(image, points, faces, colours.clip(0, 255))
    noise = rng.normal(0, rng.uniform(0, 6), image.shape)
    return (image + noise).clip(0, 255).round().astype(np.uint8)


def write_freihand(root: Path, seed: int = 0) -> None:
    """``{training,evaluation}/rgb`` and the lists beside them."""
    root = Path(root)
    mean = np.concatenate([np.zeros(3), synthetic_hand().hands_mean])
    for where, (split, versions) in enumerate(VERSIONS.items()):
        number, size = SPEC['hands'][where], SPEC['size']
        rng = np.random.default_rng([seed, where])
        poses, shapes = draw_poses(rng, number)
        xyz, verts = pose_hands(poses, shapes)
        cameras = [place_before_camera(rng, *pair, size) for pair in zip(xyz, verts, strict=True)]
        for block in range(len(versions)):
            for i in range(number):
                picture = draw_hand(rng, cameras[i], verts[i], size)
                save(root / split / 'rgb' / f'{i + block * number:08d}.jpg', picture)
        roots = [(K @ p[MIDDLE])[:2] / p[MIDDLE, 2] for K, p in zip(cameras, xyz, strict=True)]
        scale = np.linalg.norm(xyz[:, MIDDLE] - xyz[:, MIDDLE + 1], axis=1)
        mano = np.concatenate([poses.reshape(-1, 48) - mean, shapes, roots, scale[:, None]], 1)
        lists = dict(K=np.array(cameras), xyz=xyz, verts=verts, mano=mano[:, None], scale=scale)
        for name, values in lists.items():
            path = root / f'{split}_{name}.json'
            path.write_text(json.dumps(np.round(values, 6).tolist()))


def make_freihand(folder: str | Path) -> None:
    """Draw the data set in ``folder`` unless it is there already."""
    draw_once(Path(folder), json.dumps(dict(version=VERSION, **SPEC)), write_freihand)
