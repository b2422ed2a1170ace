"""A right hand of MANO's shapes, drawn by a few rules: it stands in for MANO in demos and tests.

A tube of rings of 16 vertices, open at the wrist, is the palm. Four fingers grow out of its other
end and the thumb out of a hole in its side, each of rings of 10 vertices and a tip. The hand lies
in a camera's coordinates (x right, y down, z away), the palm towards the viewer, metres.
"""

from functools import cache
from itertools import pairwise

import numpy as np

from .hand_model import TIPS, HandModel

PALM_RINGS = 11
FINGERS = ('pinky', 'ring', 'middle', 'index', 'thumb')  # from left to right
RINGS = dict(pinky=11, ring=12, middle=12, index=12, thumb=12)
FIRST_JOINT = dict(index=1, middle=4, pinky=7, ring=10, thumb=13)
TIP = dict(zip(('thumb', 'index', 'middle', 'ring', 'pinky'), TIPS, strict=True))
BENDS = (0, 5, 8)  # the rings at a finger's joints
THUMB_ROW = 3  # the palm's ring at which the thumb's hole begins
THUMB = np.array([0.66, -0.66, -0.35]) / np.linalg.norm([0.66, -0.66, -0.35])

#: What a shape coefficient of 1 changes by SPREAD, in its order.
SIZES = dict(
    size=1.0,
    width=0.082,
    thickness=0.024,
    palm=0.09,
    length=1.0,
    girth=0.0085,
    thumb=0.068,
    index=0.080,
    pinky=0.062,
    middle=0.088,
)
RING_FINGER = 0.081
SPREAD = 0.08


def flexion_axis(finger: str) -> np.ndarray:
    """The axis about which a positive angle bends a finger towards the palm."""
    if finger != 'thumb':
        return np.array([1.0, 0, 0])
    axis = np.cross(THUMB, [-1, 0, -0.6])
    return axis / np.linalg.norm(axis)


def palm_ring(along: float, sizes: dict) -> np.ndarray:
    """16 x 3: five vertices in front from left to right, three at the side, five behind, three."""
    wide, thick = sizes['width'] / 2, sizes['thickness'] / 2
    wide *= 0.68 + 0.32 * np.sin(np.pi / 2 * min(1, 1.6 * along)) - 0.03 * along
    x = np.linspace(-1, 1, 5) * (wide - thick)
    turn = np.radians([-45, 0, 45])
    side = np.stack([wide - thick + thick * np.cos(turn), thick * np.sin(turn)], 1)
    bulge = 1 + 0.15 * np.cos(np.linspace(-1, 1, 5) * np.pi / 2)
    front, back = np.stack([x, -thick * bulge], 1), np.stack([x, thick * bulge], 1)[::-1]
    flat = np.concatenate([front, side, back, -side])
    return np.stack([flat[:, 0], np.full(16, -along * sizes['palm']), flat[:, 1]], 1)


def base_of(finger: str, webs: np.ndarray) -> list[int]:
    """The loop of 10 palm vertices from which a finger grows."""
    if finger == 'thumb':
        rows, left, middle, right = [16 * (THUMB_ROW + i) for i in range(4)], 5, 6, 7
        first, last = rows[0], rows[-1]
        up, down = [row + right for row in rows[1:-1]], [row + left for row in rows[-2:0:-1]]
        ends = (
            [first + left, first + middle, first + right],
            [last + right, last + middle, last + left],
        )
        return [*ends[0], *up, *ends[1], *down]
    i, top = FINGERS.index(finger), 16 * (PALM_RINGS - 1)
    front, back = [top + i, top + i + 1], [top + 11 - i, top + 12 - i]
    right = webs[i] if i < 3 else top + np.array([5, 6, 7])
    left = webs[i - 1][::-1] if i else top + np.array([13, 14, 15])
    return [*front, *right, *back, *left]


def grow(points: list, loop: list[int], axis, length, girth, rings) -> tuple[list, list[list[int]]]:
    """Add a finger's rings and tip to ``points``; its loops of vertices, and the tip as one."""
    base = np.array([points[i] for i in loop])
    centre = base.mean(0)
    across = np.cross(axis, [0, 0, 1.0])
    across /= np.linalg.norm(across)
    other = np.cross(axis, across)
    angles = np.arctan2((base - centre) @ other, (base - centre) @ across)
    way = np.sign(np.sin(np.roll(angles, -1) - angles).sum())
    steps = way * 2 * np.pi / 10 * np.arange(10)
    angles = np.angle(np.exp(1j * (angles - steps)).mean()) + steps
    loops = [loop]
    for ring in range(1, rings + 1):
        along = length * (ring / (rings + 0.5) if ring < rings else 0.985)
        radius = girth * (1.08 - 0.3 * along / length)
        radius *= 1 + 0.06 * np.cos(2 * np.pi * along / length * 2.4)
        left = length - along  # a round end
        radius = np.sqrt(radius**2 - max(0, radius - left) ** 2)
        circle = np.outer(np.cos(angles), across) + np.outer(np.sin(angles), other)
        loops.append(list(range(len(points), len(points) + 10)))
        points += list(centre + axis * along + radius * circle)
    loops.append([len(points)])
    points.append(centre + axis * length)
    return points, loops


def build(sizes: dict) -> tuple[np.ndarray, dict[str, list]]:
    """Vertices (780, 3), two of them inside the thumb, and each finger's loops of vertices."""
    points = [p for i in range(PALM_RINGS) for p in palm_ring(i / (PALM_RINGS - 1), sizes)]
    top = np.array(points[-16:])
    webs = len(points) + np.arange(9).reshape(3, 3)
    for column in (1, 2, 3):
        for share in (0.25, 0.5, 0.75):
            points.append(top[column] + share * (top[12 - column] - top[column]))
    loops = {}
    lengths = dict(sizes, ring=RING_FINGER)
    for i, finger in enumerate(FINGERS):
        axis = THUMB if finger == 'thumb' else np.array([0.09 * (i - 1.6), -1, 0])
        girth = sizes['girth'] * dict(pinky=0.86, thumb=1.18).get(finger, 1)
        points, loops[finger] = grow(
            points,
            base_of(finger, webs),
            axis / np.linalg.norm(axis),
            lengths[finger] * sizes['length'],
            girth,
            RINGS[finger],
        )
    return np.array(points) * sizes['size'], loops


def faces_of(loops: dict[str, list]) -> np.ndarray:
    """Triangles, counterclockwise as seen from outside."""
    hole = {16 * (THUMB_ROW + i) + j for i in range(3) for j in (5, 6)}
    quads = []
    for row in range(PALM_RINGS - 1):
        for j in range(16):
            a, b = 16 * row + j, 16 * row + (j + 1) % 16
            if a not in hole:
                quads.append((a, b, b + 16, a + 16))
    triangles = []
    for rings in loops.values():
        for low, high in pairwise(rings[:-1]):
            around = zip(low, np.roll(low, -1), np.roll(high, -1), high, strict=True)
            quads += [tuple(map(int, quad)) for quad in around]
        triangles += zip(rings[-2], np.roll(rings[-2], -1), rings[-1] * 10, strict=True)
    triangles += [part for a, b, c, d in quads for part in ((a, b, c), (a, c, d))]
    return np.array(triangles)


def weights_of(loops: dict[str, list], number: int) -> np.ndarray:
    """Skinning weights (number, 16): one bone between joints, a blend of two around a joint."""
    weights = np.zeros((number, 16))
    for finger, rings in loops.items():
        first = FIRST_JOINT[finger]
        for ring, loop in enumerate(rings):
            passed = [np.clip((ring - bend + 1.5) / 3, 0, 1) for bend in BENDS]
            shares = -np.diff([1, *passed, 0])
            for bone, share in zip((0, first, first + 1, first + 2), shares, strict=True):
                weights[loop, bone] += share
    weights[weights.sum(1) == 0, 0] = 1
    return weights / weights.sum(1, keepdims=True)  # a web belongs to both its fingers


def order_of(loops: dict[str, list], number: int) -> np.ndarray:
    """Vertices as the file has them: without those inside, fingertips where FreiHAND has them."""
    inside = [16 * (THUMB_ROW + i) + 6 for i in (1, 2)]
    tips = {TIP[finger]: rings[-1][0] for finger, rings in loops.items()}
    rest = iter(np.setdiff1d(np.arange(number), [*inside, *tips.values()]))
    return np.array([tips[i] if i in tips else next(rest) for i in range(number - 2)])


@cache
def synthetic_hand() -> HandModel:
    """The hand: shape coefficients scale :data:`SIZES`, the mean pose bends the fingers."""
    points, loops = build(SIZES)
    order = order_of(loops, len(points))
    place = np.zeros(len(points), int)
    place[order] = np.arange(len(order))
    changes = [
        build({**SIZES, name: value * (1 + SPREAD)})[0] - points for name, value in SIZES.items()
    ]
    weights = weights_of(loops, len(points))[order]
    regressor = np.zeros((16, len(order)))
    regressor[0, place[:16]] = 1 / 16
    mean = np.zeros((16, 3))
    for finger, rings in loops.items():
        for bone, (bend, angle) in enumerate(zip(BENDS, (0.3, 0.4, 0.25), strict=True)):
            joint = FIRST_JOINT[finger] + bone
            regressor[joint, place[rings[bend]]] = 1 / 10
            mean[joint] = angle * flexion_axis(finger) * (0.5 if finger == 'thumb' else 1)
    # Bent joints bulge: smooth, small, and different in every direction.
    bulges = np.random.default_rng(0).normal(0, 4e-4, (15, 9, 3))
    return HandModel(
        v_template=points[order],
        shapedirs=np.stack(changes, -1)[order],
        posedirs=np.einsum('vj,jkc->vcjk', weights[:, 1:], bulges).reshape(-1, 3, 135),
        J_regressor=regressor,
        weights=weights,
        f=place[faces_of(loops)],
        hands_mean=mean[1:].ravel(),
    )
