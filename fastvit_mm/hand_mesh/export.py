"""What gets exported of a hand mesh model, and how an exported file answers in its place."""

from contextlib import suppress
from functools import partial

import torch.nn as nn

from fastvit_mm.errors import FastViTError
from fastvit_mm.export import runtime
from fastvit_mm.export.graphs import Graph

from .heads import Hand, HandHead

HAND = ('vertices', 'joints', 'points')


class VertexMesh(Graph):
    """``vertices`` (B, 778, 3) and ``joints`` (B, 21, 3), metres, relative to the root joint, and
    ``points`` (B, 21, 2), the joints in the image, which is [-1, 1] in x and y."""

    choices = ('vertices',)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.names = HAND

    def outputs(self, x):
        return tuple(self.run(x))


class ManoMesh(Graph):
    """``rotations`` (B, 16, 3, 3), ``shape`` (B, 10) and ``camera`` (B, 3), for a hand model that
    is not in the file; or ``vertices`` and what goes with them, with the hand model inside."""

    choices = ('rotations', 'vertices')
    PARAMETERS = ('rotations', 'shape', 'camera')

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.names = HAND if self.names == ('vertices',) else self.PARAMETERS
        if self.names == self.PARAMETERS:  # a file holds every buffer, used or not
            head = self.model.head
            del head.layer, head.mean_pose, head.faces

    def network(self, x):
        if self.names == HAND:
            return tuple(super().network(x))
        camera, rotations, shape = self.model.head.parameters_of(self.model.extract_feat(x))
        return rotations, shape, camera

    def outputs(self, x):
        return self.run(x)


def attach_hand_mesh(model: nn.Module, run) -> None:
    """Let ``run``, from normalized images to outputs by name, answer for a model's layers."""

    def hand(feats) -> Hand:
        out = run(feats)
        if 'vertices' in out:
            return Hand(*(out[name] for name in HAND))
        return model.head.hand_of(*(out[name] for name in ('camera', 'rotations', 'shape')))

    head = model.head
    model.backbone, model.neck = nn.Identity(), None
    head.forward = hand
    head.predict = partial(HandHead.predict, head)  # whose regressor is the file's
    with suppress(FastViTError):
        head.read_hand_model()  # for pictures


for task in ('vertexmesh', 'manomesh'):
    runtime.ATTACH[task] = attach_hand_mesh
    runtime.NUM_CLASSES[task] = lambda model: 0
