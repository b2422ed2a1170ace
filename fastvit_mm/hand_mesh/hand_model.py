"""MANO's arrays, read safely, and the differentiable layer that poses them.

MANO may not be redistributed: users register at its home page and name their ``MANO_RIGHT.pkl`` or
an ``.npz`` of it. :mod:`.synthetic_hand` has a hand of the same shapes for demos and tests.
"""

import pickle
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastvit_mm.errors import FastViTError, one_line

HOME_PAGE = 'https://mano.is.tue.mpg.de'
SYNTHETIC = 'synthetic'  # in place of a path

#: FreiHAND's order of the 16 joints followed by the fingertips: wrist, then four a finger from the
#: thumb to the little finger.
ORDER = [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]
TIPS = [744, 320, 443, 555, 672]  # FreiHAND's vertices at the tips; other projects' differ
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
WRIST, MIDDLE = 0, 9  # among FreiHAND's joints: METRO's root; the first joint of the middle finger


@dataclass
class HandModel:
    """The arrays of a hand, float64, in metres, under the names and shapes of MANO's file."""

    v_template: np.ndarray  # 778 x 3
    shapedirs: np.ndarray  # 778 x 3 x 10
    posedirs: np.ndarray  # 778 x 3 x 135
    J_regressor: np.ndarray  # 16 x 778
    weights: np.ndarray  # 778 x 16
    f: np.ndarray  # 1538 x 3, int64
    hands_mean: np.ndarray  # 45: the mean pose, axis-angle of joints 1 to 15

    def joint_regressor(self) -> np.ndarray:
        """From vertices to FreiHAND's joints: 21 x 778."""
        return np.concatenate([self.J_regressor, np.eye(778)[TIPS]])[ORDER]


SHAPES = dict(
    v_template=(778, 3),
    shapedirs=(778, 3, 10),
    posedirs=(778, 3, 135),
    J_regressor=(16, 778),
    weights=(778, 16),
    f=(1538, 3),
    hands_mean=(45,),
)


class Stub:
    """Holds the state of a pickled object whose own class is not needed."""

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


class Ch(Stub):
    """chumpy's array: ``x``."""

    def array(self) -> np.ndarray:
        return np.asarray(self.x)


class Select(Stub):
    """chumpy's choice of elements: ``a``, ``idxs``, ``preferred_shape``."""

    def array(self) -> np.ndarray:
        chosen = dense(self.a).ravel()[np.asarray(self.idxs)]
        return chosen.reshape(tuple(self.preferred_shape))


class Csc(Stub):
    """scipy's compressed sparse columns; numpy checks the indices, scipy's C code does not."""

    def array(self) -> np.ndarray:
        out = np.zeros(getattr(self, '_shape', None) or self.shape)
        columns = np.repeat(np.arange(out.shape[1]), np.diff(self.indptr))
        np.add.at(out, (np.asarray(self.indices), columns), self.data)
        return out


def dense(value) -> np.ndarray:
    return value.array() if isinstance(value, Stub) else np.asarray(value)


_reconstruct = getattr(np, '_core', getattr(np, 'core', None)).multiarray._reconstruct
ADMITTED = {
    **dict.fromkeys([('__builtin__', 'set'), ('builtins', 'set')], set),
    ('numpy', 'dtype'): np.dtype,
    ('numpy', 'ndarray'): np.ndarray,
    **{(f'numpy.{core}.multiarray', '_reconstruct'): _reconstruct for core in ('core', '_core')},
    **{(f'scipy.sparse.{name}', 'csc_matrix'): Csc for name in ('csc', '_csc')},
    ('chumpy.ch', 'Ch'): Ch,
    ('chumpy.reordering', 'Select'): Select,
}


class Unpickler(pickle.Unpickler):
    """Admits what MANO's file names and nothing else: no pickle can run code."""

    def find_class(self, module, name):
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise FastViTError(f'it names {module}.{name}, which no hand model does') from None


def read_hand_model(path: str | Path) -> HandModel:
    """Read ``MANO_RIGHT.pkl`` or an ``.npz`` of it without running its pickle.

    Args:
        path: of the file; ``'synthetic'`` for the demo's hand.

    Raises:
        FastViTError: a file that is missing, cannot be read, names foreign classes, holds arrays
            of other shapes or values, or a left hand.
    """
    if str(path) == SYNTHETIC:
        from .synthetic_hand import synthetic_hand

        return synthetic_hand()
    path = Path(path)
    if not path.is_file():
        raise FastViTError(f'hand model {path} does not exist: register at {HOME_PAGE} to get it')
    try:
        if path.suffix == '.npz':
            with np.load(path, allow_pickle=False) as archive:
                content = {key: archive[key] for key in archive.files}
        else:
            with path.open('rb') as file:
                content = Unpickler(file, encoding='latin1').load()
        arrays = {name: dense(content[name]) for name in SHAPES}
        parents = dense(content['kintree_table'])[0].astype(np.int64)
    except KeyError as error:
        raise FastViTError(f'hand model {path} has no {error}') from error
    except Exception as error:  # whatever a damaged or hostile pickle raises
        raise FastViTError(f'hand model {path} cannot be read: {one_line(error)}') from error
    return checked(path, arrays, parents)


def checked(path: Path, arrays: dict[str, np.ndarray], parents: np.ndarray) -> HandModel:
    for name, shape in SHAPES.items():
        array = arrays[name]
        if array.shape != shape:
            raise FastViTError(f'hand model {path}: {name} is {array.shape}, MANO has {shape}')
        if array.dtype.kind not in 'fiu' or not np.isfinite(array).all():
            raise FastViTError(f'hand model {path}: {name} does not hold finite numbers')
        arrays[name] = array.astype(np.int64 if name == 'f' else np.float64)
    faces = arrays['f']
    sums = (arrays['weights'].sum(1), arrays['J_regressor'].sum(1))
    wrong = (
        'tree of joints' * (tuple(parents[1:]) != PARENTS[1:])
        or 'faces' * bool(faces.min() < 0 or faces.max() >= 778)
        or 'weights' * any(abs(total - 1).max() > 1e-2 for total in sums)
        or 'angles of the mean pose' * (not arrays['hands_mean'].any())
    )
    if wrong:
        raise FastViTError(f'hand model {path}: its {wrong} are not those of MANO')
    hand = HandModel(**arrays)
    if is_left(hand):
        raise FastViTError(
            f'hand model {path} is a left hand, FreiHAND has right hands: give MANO_RIGHT.pkl'
        )
    return hand


def is_left(hand: HandModel) -> bool:
    """Whether the mean pose bends the fingers away from where a right hand has its palm.

    Independent of the axes: the palm of a right hand faces along the vector product of the
    directions from the wrist to index and little finger; a left hand's is on the other side.
    """
    joints = hand.J_regressor @ hand.v_template
    axes = hand.hands_mean.reshape(15, 3)
    bent = sum(
        np.cross(axes[joint - 1], joints[joint + 1] - joints[joint])
        for finger in (1, 4, 7, 10)  # not the thumb
        for joint in (finger, finger + 1)
    )
    index, little = joints[[1, 7]] - joints[0]
    return np.cross(index, little) @ bent < 0


def write_hand_model(hand: HandModel, path: str | Path) -> None:
    """Write an ``.npz`` that :func:`read_hand_model` reads."""
    values = dict(zip((field.name for field in fields(hand)), astuple(hand), strict=True))
    tree = np.array([PARENTS, range(16)])
    np.savez(path, kintree_table=tree, hands_components=np.eye(45), **values)


def matrices_of_6d(values: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of any (..., 6): two columns, made orthonormal. Continuous."""
    first, second = values.unflatten(-1, (2, 3)).unbind(-2)
    x = F.normalize(first, dim=-1)
    y = F.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    # written out, as Core ML knows no cross product
    z = x.roll(-1, -1) * y.roll(1, -1) - x.roll(1, -1) * y.roll(-1, -1)
    return torch.stack([x, y, z], -1)


def matrices_of_axis_angle(values: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of axis-angle vectors (..., 3), smooth at zero."""
    x, y, z = values.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.matrix_exp(
        torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    )


class HandLayer(nn.Module):
    """From pose and shape to vertices: blend shapes, then linear blend skinning. Differentiable.

    Its buffers are not in checkpoints: MANO may not be redistributed.
    """

    def __init__(self, hand: HandModel):
        super().__init__()
        arrays = dict(
            template=hand.v_template,
            shape_dirs=hand.shapedirs.reshape(-1, 10).T,
            pose_dirs=hand.posedirs.reshape(-1, 135).T,
            regressor=hand.J_regressor,
            weights=hand.weights,
            joint_regressor=hand.joint_regressor(),
        )
        for name, array in arrays.items():
            value = torch.tensor(array, dtype=torch.float32)
            self.register_buffer(name, value, persistent=False)

    def forward(self, rotations: Tensor, shape: Tensor) -> Tensor:
        """Vertices (B, 778, 3), metres, of rotations (B, 16, 3, 3), each relative to its parent,
        and shape coefficients (B, 10)."""
        rest = self.template + (shape @ self.shape_dirs).unflatten(1, (-1, 3))
        joints = self.regressor @ rest
        bends = rotations[:, 1:] - torch.eye(3).to(rotations)
        rest = rest + (bends.flatten(1) @ self.pose_dirs).unflatten(1, (-1, 3))
        turns, places = [rotations[:, 0]], [joints[:, 0]]
        for joint, parent in enumerate(PARENTS[1:], 1):
            bone = joints[:, joint] - joints[:, parent]
            places.append(places[parent] + (turns[parent] @ bone[..., None])[..., 0])
            turns.append(turns[parent] @ rotations[:, joint])
        turns, places = torch.stack(turns, 1), torch.stack(places, 1)
        moves = places - (turns @ joints[..., None])[..., 0]
        turns = (self.weights @ turns.flatten(2)).unflatten(2, (3, 3))
        return (turns @ rest[..., None])[..., 0] + self.weights @ moves

    def joints(self, vertices: Tensor) -> Tensor:
        """FreiHAND's joints (B, 21, 3) of posed vertices (B, 778, 3)."""
        return self.joint_regressor @ vertices
