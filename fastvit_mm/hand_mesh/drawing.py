"""Hands as pictures: triangles painted from far to near, on any machine."""

from itertools import pairwise

import cv2
import numpy as np

from fastvit_mm.errors import FastViTError

SKIN = (140, 170, 225)  # BGR
FINGERS = ((60, 60, 230), (40, 170, 240), (70, 190, 60), (220, 150, 40), (200, 60, 170))  # BGR
LIGHT = np.array([-0.4, -0.6, -1.0])  # from above, from the left and from in front of the hand
SHIFT = 4  # bits below a pixel
FINE = 2  # times as fine when painted, for smooth edges
SIDE = 512  # pixels of a picture


def shades(points: np.ndarray, faces: np.ndarray, light=LIGHT, ambient=0.35) -> np.ndarray:
    """Brightness of each triangle, 0 to 1, smooth over the surface. y points down, z away."""
    a, b, c = (points[faces[:, i]] for i in range(3))
    flat = np.cross(b - a, c - a)
    smooth = np.zeros_like(points)
    for corner in range(3):
        np.add.at(smooth, faces[:, corner], flat)
    normals = smooth[faces].sum(1)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12
    facing = normals @ (light / np.linalg.norm(light))
    return ambient + (1 - ambient) * facing.clip(0, 1)


def paint(image: np.ndarray, points: np.ndarray, faces: np.ndarray, colours: np.ndarray):
    """Paint a mesh on a copy of ``image``, far triangles first.

    Args:
        image: uint8 (H, W, 3).
        points: (V, 3): x and y in pixels, pixel centres at whole numbers; z grows away.
        faces: (F, 3), counterclockwise as seen from outside.
        colours: (F, 3), 0 to 255.
    """
    height, width = image.shape[:2]
    flat = (points[:, :2] + 0.5) * FINE - 0.5
    a, b, c = (flat[faces[:, i]] for i in range(3))
    (x1, y1), (x2, y2) = (b - a).T, (c - a).T
    seen = x1 * y2 < y1 * x2  # z of a normal towards the viewer
    order = np.argsort(-points[faces, 2].mean(1))
    order = order[seen[order]]
    corners = np.round(flat[faces[order]] * 2**SHIFT).clip(-(2**20), 2**20).astype(np.int32)
    fine = cv2.resize(image, (width * FINE, height * FINE), interpolation=cv2.INTER_LINEAR)
    for triangle, colour in zip(corners, colours[order].tolist(), strict=True):
        cv2.fillConvexPoly(fine, triangle, colour, shift=SHIFT)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)


def mesh_colours(verts: np.ndarray, faces: np.ndarray) -> np.ndarray:
    return shades(verts, faces)[:, None] * np.array(SKIN, float)


def weak_perspective(xyz: np.ndarray, uv: np.ndarray) -> tuple[float, np.ndarray]:
    """Scale and shift (2,) that take x and y of ``xyz`` (P, 3) to ``uv`` (P, 2), least squares."""
    flat, middle = xyz[:, :2] - xyz[:, :2].mean(0), uv.mean(0)
    scale = max((flat * (uv - middle)).sum() / (flat**2).sum(), 1e-6)
    return scale, middle - scale * xyz[:, :2].mean(0)


def overlay(image: np.ndarray, xyz, uv, verts, faces) -> np.ndarray:
    """The mesh over the image; ``uv`` in its pixels, ``xyz`` and ``verts`` as predicted."""
    scale, shift = weak_perspective(xyz, uv)
    points = np.concatenate([verts[:, :2] * scale + shift, verts[:, 2:]], 1)
    return paint(image, points, faces, mesh_colours(verts, faces))


def draw_hand(image: np.ndarray, sample, same_size: bool = False) -> np.ndarray:
    """A prediction of :func:`fastvit_mm.inference`: the mesh over the image, and from the side.

    Args:
        image: BGR uint8 (H, W, 3).
        same_size: over the image alone, which keeps its size.
    """
    names = ('pred_xyz', 'pred_uv', 'pred_verts', 'faces')
    xyz, uv, verts, faces = (sample.get(name).cpu().numpy() for name in names)
    if not faces.any():
        raise FastViTError(
            'the triangles are unknown: name the hand model with --cfg-options '
            'model.head.hand_model=FILE'
        )
    if same_size:
        return overlay(image, xyz, uv, verts, faces)
    factor = SIDE / image.shape[0]
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    over = overlay(image, xyz, (uv + 0.5) * factor - 0.5, verts, faces)
    return np.hstack([image, over, turntable(verts, faces, np.pi / 2, len(image))])


def turntable(verts: np.ndarray, faces: np.ndarray, angle: float, side: int = SIDE) -> np.ndarray:
    """The mesh alone, turned by ``angle`` (radians) about the vertical, on white: BGR uint8."""
    verts = verts - (verts.min(0) + verts.max(0)) / 2
    scale = 0.46 * side / np.linalg.norm(verts, axis=1).max()
    cos, sin = np.cos(angle), np.sin(angle)
    verts = verts @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    points = verts * scale + [side / 2, side / 2, 0]
    blank = np.full((side, side, 3), 255, np.uint8)
    return paint(blank, points, faces, mesh_colours(verts, faces))


def write_gif(path, verts: np.ndarray, faces: np.ndarray, frames: int = 36) -> None:
    """A turntable of ``frames`` pictures, endless."""
    from PIL import Image

    turns = np.linspace(0, 2 * np.pi, frames, endpoint=False)
    pictures = [
        Image.fromarray(turntable(verts, faces, angle, SIDE // 2)[..., ::-1]) for angle in turns
    ]
    try:
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=70, loop=0)
    except OSError as error:
        raise FastViTError(f'cannot write {path}: {error}') from error


def draw_joints(image: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """The 21 joints of a hand, a colour a finger, each joined to the one before.

    Args:
        image: BGR uint8 (H, W, 3).
        uv: (21, 2), pixels of it.
    """
    image, points = image.copy(), np.round(uv).astype(int).tolist()
    for finger, colour in enumerate(FINGERS):
        chain = [points[0], *points[1 + 4 * finger : 5 + 4 * finger]]
        for start, end in pairwise(chain):
            cv2.line(image, start, end, colour, 2, cv2.LINE_AA)
        for point in chain[1:]:
            cv2.circle(image, point, 4, colour, -1, cv2.LINE_AA)
    cv2.circle(image, points[0], 5, (255, 255, 255), -1, cv2.LINE_AA)
    return image
