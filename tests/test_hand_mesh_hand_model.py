"""MANO's file, read safely; the synthetic hand; the layer, held against smplx."""

import collections
import io
import pickle
import pickletools
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix
from scipy.spatial.transform import Rotation

from fastvit_mm import FastViTError
from fastvit_mm.hand_mesh import hand_model
from fastvit_mm.hand_mesh.hand_model import (
    PARENTS,
    SHAPES,
    TIPS,
    HandLayer,
    matrices_of_6d,
    matrices_of_axis_angle,
    read_hand_model,
    write_hand_model,
)

HAND = read_hand_model('synthetic')


def mano_content(**changes) -> dict:
    """What MANO_RIGHT.pkl holds, of the synthetic hand."""
    content = {name: getattr(HAND, name) for name in SHAPES}
    content['f'] = content['f'].astype(np.uint32)
    content['J_regressor'] = csc_matrix(HAND.J_regressor)
    content['kintree_table'] = np.array([[2**32 - 1, *PARENTS[1:]], range(16)])
    content['hands_components'] = np.eye(45)
    content.update(bs_style='lbs', bs_type='lrotmin', **changes)
    return content


@pytest.fixture
def chumpy(monkeypatch):
    """Classes of chumpy's names, to write with; they are gone when the file is read."""
    modules = {}
    monkeypatch.setitem(sys.modules, 'chumpy', types.ModuleType('chumpy'))
    for module, name in (('chumpy.ch', 'Ch'), ('chumpy.reordering', 'Select')):
        modules[module] = types.ModuleType(module)
        made = type(name, (), {'__module__': module})
        setattr(modules[module], name, made)
        monkeypatch.setitem(sys.modules, module, modules[module])

    def make(kind, **state):
        module = 'chumpy.ch' if kind == 'Ch' else 'chumpy.reordering'
        one = getattr(modules[module], kind)()
        one.__dict__.update(state)
        return one

    return make


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did: strings of bytes, and the modules' names of the time."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack('<i', len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def write(path: Path, content) -> Path:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    written = file.getvalue().replace(b'numpy._core.', b'numpy.core.')
    path.write_bytes(written.replace(b'scipy.sparse._csc', b'scipy.sparse.csc'))
    return path


# ----------------------------------------------------------------------------------- reading it


def same(hand):
    for name in SHAPES:
        np.testing.assert_array_equal(getattr(hand, name), getattr(HAND, name), name)


def test_reads_what_mano_holds(tmp_path, chumpy, monkeypatch):
    flat = HAND.shapedirs.ravel()
    shuffled = np.random.default_rng(0).permutation(flat.size)
    back = np.argsort(shuffled)
    shape_dirs = chumpy(
        'Select', a=chumpy('Ch', x=flat[shuffled]), idxs=back, preferred_shape=(778, 3, 10)
    )
    content = mano_content(
        shapedirs=shape_dirs, posedirs=chumpy('Ch', x=HAND.posedirs), joints={1, 2}
    )
    path = write(tmp_path / 'MANO_RIGHT.pkl', content)
    for module in ('chumpy', 'chumpy.ch', 'chumpy.reordering'):
        monkeypatch.delitem(sys.modules, module)
    named = {arg for code, arg, _ in pickletools.genops(path.read_bytes()) if code.name == 'GLOBAL'}
    assert named == {
        'numpy dtype',
        'numpy ndarray',
        'numpy.core.multiarray _reconstruct',
        '__builtin__ set',
        'scipy.sparse.csc csc_matrix',
        'chumpy.ch Ch',
        'chumpy.reordering Select',
    }
    same(read_hand_model(path))
    path.write_bytes(pickle.dumps(mano_content()))  # as Python 3 writes it
    same(read_hand_model(path))


def test_writes_and_reads_npz(tmp_path):
    write_hand_model(HAND, tmp_path / 'hand.npz')
    same(read_hand_model(tmp_path / 'hand.npz'))


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_hostile_pickle_runs_nothing(tmp_path):
    mark = tmp_path / 'mark'
    attacks = (
        Hostile(Path.touch, mark),
        Hostile(eval, f'open({str(mark)!r}, "w")'),
        Hostile(np.save, str(mark), np.zeros(1)),
        Hostile(pickle.loads, pickle.dumps(Hostile(Path.touch, mark))),
    )
    for attack in attacks:
        write(tmp_path / 'bad.pkl', attack)
        with pytest.raises(FastViTError, match='no hand model does') as error:
            read_hand_model(tmp_path / 'bad.pkl')
        assert '\n' not in str(error.value)
        write(tmp_path / 'bad.pkl', mano_content(extra=attack))
        with pytest.raises(FastViTError, match='no hand model does'):
            read_hand_model(tmp_path / 'bad.pkl')
    np.savez(tmp_path / 'bad.npz', **mano_content(J_regressor=np.array(attacks, object)))
    with pytest.raises(FastViTError, match='cannot be read'):
        read_hand_model(tmp_path / 'bad.npz')
    assert not list(tmp_path.glob('mark*'))


def test_a_sparse_array_cannot_point_elsewhere(tmp_path):
    regressor = csc_matrix(HAND.J_regressor)
    regressor.indices[0] = 10**6
    write(tmp_path / 'bad.pkl', mano_content(J_regressor=regressor))
    with pytest.raises(FastViTError, match='cannot be read'):
        read_hand_model(tmp_path / 'bad.pkl')


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(v_template=np.zeros((6890, 3))), r'v_template is \(6890, 3\)'),
        (dict(shapedirs=HAND.shapedirs[..., :5]), 'shapedirs'),
        (dict(f=np.full((1538, 3), 778)), 'faces'),
        (dict(weights=HAND.weights * 0), 'weights'),
        (dict(posedirs=HAND.posedirs * np.nan), 'posedirs does not hold finite'),
        (dict(hands_mean=np.array(['a'] * 45)), 'hands_mean does not hold finite'),
        (dict(kintree_table=np.array([range(-1, 15), range(16)])), 'tree'),
        (dict(hands_mean=np.zeros(45)), 'mean pose'),
    ],
)
def test_another_model_is_one_line(tmp_path, changes, words):
    path = write(tmp_path / 'other.pkl', mano_content(**changes))
    with pytest.raises(FastViTError, match=words) as error:
        read_hand_model(path)
    assert '\n' not in str(error.value) and 'other.pkl' in str(error.value)


@pytest.mark.parametrize('seed', range(3))
def test_a_left_hand_is_refused(tmp_path, seed):
    """However the hand lies in its file: MANO's point along x, ours along y."""
    turn = Rotation.random(random_state=seed).as_matrix()
    turned = dict(
        v_template=HAND.v_template @ turn.T,
        shapedirs=np.einsum('ij,vjk->vik', turn, HAND.shapedirs),
        posedirs=np.einsum('ij,vjk->vik', turn, HAND.posedirs),
        hands_mean=(HAND.hands_mean.reshape(15, 3) @ turn.T).ravel(),
    )
    read_hand_model(write(tmp_path / 'MANO_RIGHT.pkl', mano_content(**turned)))
    # MANO_LEFT.pkl is the mirror image: x of the points, y and z of the axes, faces turned over
    flip = np.array([-1, 1, 1])
    left = dict(
        v_template=turned['v_template'] * flip,
        shapedirs=turned['shapedirs'] * flip[:, None],
        posedirs=turned['posedirs'] * flip[:, None],
        hands_mean=turned['hands_mean'] * np.tile(-flip, 15),
        f=HAND.f[:, ::-1].astype(np.uint32),
    )
    path = write(tmp_path / 'MANO_LEFT.pkl', mano_content(**left))
    with pytest.raises(FastViTError, match=r'is a left hand.*give MANO_RIGHT\.pkl') as error:
        read_hand_model(path)
    assert '\n' not in str(error.value)


def test_what_is_no_file_of_the_kind(tmp_path):
    with pytest.raises(FastViTError, match=r'does not exist.*https://mano'):
        read_hand_model(tmp_path / 'MANO_RIGHT.pkl')
    for name, content in (('a.pkl', b''), ('a.npz', b'x' * 100), ('b.pkl', b'\x80\x02}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FastViTError, match='cannot be read') as error:
            read_hand_model(tmp_path / name)
        assert '\n' not in str(error.value)
    with pytest.raises(FastViTError, match='v_template'):
        read_hand_model(write(tmp_path / 'c.pkl', {}))
    with pytest.raises(FastViTError, match='cannot be read'):
        read_hand_model(write(tmp_path / 'd.pkl', [1, 2]))


# ---------------------------------------------------------------------------- the synthetic hand


def test_the_surface_is_closed_but_for_the_wrist():
    edges = collections.Counter(
        (int(face[i]), int(face[i - 2])) for face in HAND.f for i in range(3)
    )
    assert set(edges.values()) == {1}
    assert sum((b, a) not in edges for a, b in edges) == 16
    assert len(np.unique(HAND.f)) == 778
    a, b, c = (HAND.v_template[HAND.f[:, i]] for i in range(3))
    assert 1e-4 < np.einsum('ij,ij', a, np.cross(b, c)) / 6 < 5e-4  # cubic metres, outside out


def test_it_is_a_right_hand_that_bends_to_its_palm():
    layer = HandLayer(HAND)
    flat = torch.eye(3).expand(1, 16, 3, 3)
    bent = flat.clone()
    bent[:, 1:] = matrices_of_axis_angle(torch.tensor(HAND.hands_mean).float().view(1, 15, 3))
    rest, curled = (layer.joints(layer(r, torch.zeros(1, 10)))[0] for r in (flat, bent))
    tips = [4, 8, 12, 16, 20]
    np.testing.assert_allclose(rest[tips], HAND.v_template[TIPS], atol=1e-6)
    palm = torch.linalg.cross(rest[17] - rest[0], rest[5] - rest[0])
    palm = -palm / palm.norm()
    assert ((curled - rest)[tips[1:]] @ palm > 0.01).all()
    assert rest[4][0] > rest[8][0] > rest[12][0] > rest[16][0] > rest[20][0]
    first = torch.arange(1, 21, 4)
    for joint in range(3):
        bones = (rest[first + joint + 1] - rest[first + joint]).norm(dim=-1)
        assert (bones > 0.015).all() and (bones < 0.05).all()


# --------------------------------------------------------------------------------------- the layer


def poses(number=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.6, (number, 16, 3)), rng.normal(0, 1, (number, 10))


def test_rotations_against_scipy():
    angles, _ = poses()
    wanted = Rotation.from_rotvec(angles.reshape(-1, 3)).as_matrix().reshape(3, 16, 3, 3)
    found = matrices_of_axis_angle(torch.tensor(angles))
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    columns = torch.tensor(wanted[..., :2]).transpose(-1, -2).flatten(-2)
    np.testing.assert_allclose(matrices_of_6d(columns), wanted, atol=1e-12)
    any_values = matrices_of_6d(torch.randn(50, 6, dtype=torch.float64))
    np.testing.assert_allclose(any_values.det(), 1, atol=1e-9)
    assert matrices_of_axis_angle(torch.zeros(2, 3)).equal(torch.eye(3).expand(2, 3, 3))


def test_the_layer_against_smplx(tmp_path):
    from smplx import MANO

    write(tmp_path / 'MANO_RIGHT.pkl', mano_content(J_regressor=HAND.J_regressor))
    theirs = MANO(str(tmp_path / 'MANO_RIGHT.pkl'), use_pca=False, batch_size=3)
    angles, shape = (torch.tensor(a).float() for a in poses())
    wanted = theirs(betas=shape, global_orient=angles[:, 0], hand_pose=angles[:, 1:].reshape(3, 45))
    layer = HandLayer(HAND)
    full = angles + torch.cat([torch.zeros(3), torch.tensor(HAND.hands_mean).float()]).view(16, 3)
    found = layer(matrices_of_axis_angle(full), shape)
    np.testing.assert_allclose(found, wanted.vertices.detach(), atol=2e-7)
    assert found.std(0).max() > 0.01
    # their joints are those of the rest pose, carried along: only the tips are ours
    np.testing.assert_allclose(layer.joints(found)[:, 4::4], found[:, TIPS])


def test_the_vertices_at_the_fingertips_are_freihands():
    """manopth takes 745, 317, 444, 556, 673 and smplx 744, 320, 443, 554, 671."""
    assert TIPS == [744, 320, 443, 555, 672]
    assert HAND.joint_regressor()[4::4].argmax(1).tolist() == TIPS


def test_joints_are_regressed_from_the_posed_vertices():
    layer = HandLayer(HAND)
    angles, shape = (torch.tensor(a).float() for a in poses())
    vertices = layer(matrices_of_axis_angle(angles), shape)
    sixteen = np.einsum('jv,bvc->bjc', HAND.J_regressor, vertices)
    both = np.concatenate([sixteen, vertices[:, TIPS]], 1)
    np.testing.assert_allclose(layer.joints(vertices), both[:, hand_model.ORDER], atol=1e-6)


def test_gradients_by_finite_differences():
    layer = HandLayer(HAND).double()
    angles, shape = (torch.tensor(a, requires_grad=True) for a in poses(1))
    some = torch.arange(0, 778, 97)

    def of_angles(angles, shape):
        return layer(matrices_of_axis_angle(angles), shape)[:, some]

    assert torch.autograd.gradcheck(of_angles, (angles, shape))
    assert torch.autograd.gradcheck(
        of_angles, (torch.zeros_like(angles, requires_grad=True), shape)
    )
    values = torch.randn(1, 16, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v: layer.joints(layer(matrices_of_6d(v), shape.detach())), values
    )


def test_no_array_of_the_hand_is_in_a_state_dict():
    assert not HandLayer(HAND).state_dict()
