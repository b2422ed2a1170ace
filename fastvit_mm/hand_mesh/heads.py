"""From features to a hand: the paper's head, which poses MANO, and one that gives vertices."""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor

from fastvit_mm.errors import FastViTError
from fastvit_mm.models import FastViTNeck

from .hand_model import (
    MIDDLE,
    WRIST,
    HandLayer,
    matrices_of_6d,
    matrices_of_axis_angle,
    read_hand_model,
)
from .transforms import HandSample

Features = tuple[Tensor, ...]


class Hand(NamedTuple):
    """Vertices (B, 778, 3) and joints (B, 21, 3) in metres, relative to the head's root joint, and
    the joints in the image (B, 21, 2), where the image is [-1, 1] in x and y."""

    verts: Tensor
    xyz: Tensor
    points: Tensor


class HandHead(BaseModule):
    """What both heads share: predictions and targets.

    Attributes:
        root: the joint to which vertices and joints are relative.
    """

    root: int

    def read_hand_model(self) -> None:
        """Called once before training; a test has what it needs in the checkpoint."""

    def forward(self, feats: Features) -> Hand:
        raise NotImplementedError

    def predict(self, feats: Features, samples: list[HandSample]) -> list[HandSample]:
        """Set ``pred_xyz``, ``pred_verts`` (metres) and ``pred_uv`` (pixels) of each sample."""
        hand = self(feats)
        for sample, verts, xyz, points in zip(samples, *hand, strict=True):
            height, width = sample.img_shape
            size = points.new_tensor([width, height])
            sample.pred_verts, sample.pred_xyz = verts, xyz
            sample.pred_uv = (points + 1) / 2 * size - 0.5
        return samples

    def targets(self, samples: list[HandSample]) -> Hand:
        verts, xyz, uv = (torch.stack([s.get(n) for s in samples]) for n in ('verts', 'xyz', 'uv'))
        height, width = samples[0].img_shape
        points = (uv + 0.5) / uv.new_tensor([width, height]) * 2 - 1
        root = xyz[:, self.root, None]
        return Hand(verts - root, xyz - root, points)


@MODELS.register_module()
class ManoHead(HandHead):
    """The paper's head: a linear layer gives camera (3), pose (16 x 6) and shape (10), MANO the
    mesh. Losses as in METRO; on the parameters, the fingers' rotations and the shape.

    The wrist's rotation is learned from the points alone: the one in FreiHAND's parameters is not
    quite in the camera's frame.

    Args:
        in_channels: of the pooled features, (B, in_channels).
        hand_model: path of MANO_RIGHT.pkl or an npz of it.
        weights: of the losses.

    Raises:
        FastViTError: see :func:`read_hand_model`.
    """

    root = WRIST
    SCALE = 6.0  # of a camera that gives 0: a hand of 0.2 m then covers 0.6 of the image

    def __init__(
        self,
        in_channels: int,
        hand_model: str,
        weights: dict = dict(xyz=1.0, verts=1.0, points=1.0, pose=0.5, shape=1e-3),
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        hand = read_hand_model(hand_model)
        self.layer = HandLayer(hand)
        self.weights = dict(weights)
        mean = torch.cat([torch.zeros(3), torch.tensor(hand.hands_mean).float()]).view(16, 3)
        self.register_buffer('mean_pose', mean, persistent=False)
        self.register_buffer('faces', torch.tensor(hand.f), persistent=False)
        self.fc = nn.Linear(in_channels, 3 + 16 * 6 + 10)
        start = matrices_of_axis_angle(mean)[..., :2].transpose(1, 2).flatten()
        nn.init.normal_(self.fc.weight, std=0.001)
        with torch.no_grad():
            self.fc.bias.copy_(torch.cat([torch.zeros(3), start, torch.zeros(10)]))

    def parameters_of(self, feats: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Camera (B, 3), rotations (B, 16, 3, 3) and shape (B, 10)."""
        camera, pose, shape = self.fc(feats[-1]).split([3, 96, 10], 1)
        return camera, matrices_of_6d(pose.unflatten(1, (16, 6))), shape

    def hand_of(self, camera: Tensor, rotations: Tensor, shape: Tensor) -> Hand:
        verts = self.layer(rotations, shape)
        xyz = self.layer.joints(verts)
        root = xyz[:, self.root, None]
        verts, xyz = verts - root, xyz - root
        points = self.SCALE * camera[:, None, :1].exp() * xyz[..., :2] + camera[:, None, 1:]
        return Hand(verts, xyz, points)

    def forward(self, feats: Features) -> Hand:
        return self.hand_of(*self.parameters_of(feats))

    def loss(self, feats: Features, samples: list[HandSample]) -> dict[str, Tensor]:
        camera, rotations, shape = self.parameters_of(feats)
        hand, target = self.hand_of(camera, rotations, shape), self.targets(samples)
        mano = torch.stack([sample.mano for sample in samples])
        pose = matrices_of_axis_angle(mano[:, :48].unflatten(1, (16, 3)) + self.mean_pose)
        losses = dict(
            xyz=F.mse_loss(hand.xyz, target.xyz),
            verts=F.l1_loss(hand.verts, target.verts),
            points=F.mse_loss(hand.points, target.points),
            pose=F.mse_loss(rotations[:, 1:], pose[:, 1:]),
            shape=F.mse_loss(shape, mano[:, 48:58]),
        )
        return {f'loss_{name}': self.weights[name] * value for name, value in losses.items()}


@MODELS.register_module()
class FastViTFeatures(FastViTNeck):
    """FastViT's last block without the pooling that follows it: (B, C, H, W)."""

    def forward(self, feats: Features) -> Features:
        return (self.final_conv(feats[-1]),)


class TokenStage(nn.Module):
    """Attention among tokens, then more and narrower ones: (B, N, C) to (B, N', C')."""

    HEAD_WIDTH = 32

    def __init__(self, tokens: int, new_tokens: int, dim: int, new_dim: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim)
        )
        self.widen = nn.Linear(tokens, new_tokens)
        self.narrow = nn.Linear(dim, new_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        x = self.widen(self.norm3(x).transpose(1, 2)).transpose(1, 2)
        return self.narrow(x)

    def attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.HEAD_WIDTH))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each B, heads, N, width
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


@MODELS.register_module()
class VertexHead(HandHead):
    """Vertices without a hand model: features at 21 image points widen to 778 tokens.

    The image points come from pooled features. Features, upsampled four times, and a position
    embedding are sampled there; three attention stages make 84, 336 and 778 tokens of them, a
    linear layer 3 coordinates of each. Joints are regressed from the vertices.

    Args:
        in_channels: of the features, (B, in_channels, H, W).
        hand_model: for training, the path of MANO_RIGHT.pkl or an npz of it, which has the joints'
            regressor and the triangles; checkpoints hold both, so nothing else needs the file.
        weights: of the losses, all L1.
        grid: size of the position embedding.
    """

    root = MIDDLE
    TOKENS, WIDTHS = (21, 84, 336, 778), (256, 128, 64)

    def __init__(
        self,
        in_channels: int,
        hand_model: str,
        weights: dict = dict(xyz=10.0, verts=10.0, points=1.0),
        grid: int = 28,
        init_cfg: dict | None = None,
    ):
        super().__init__(init_cfg)
        self.hand_model = hand_model
        self.weights = dict(weights)
        self.points = nn.Linear(in_channels, 2 * 21)
        self.upsample = nn.ConvTranspose2d(in_channels, self.WIDTHS[0], 4, stride=4)
        self.positions = nn.Parameter(torch.empty(1, self.WIDTHS[0], grid, grid).normal_(std=0.02))
        widths = (*self.WIDTHS, self.WIDTHS[-1])
        self.stages = nn.Sequential(
            *[TokenStage(*self.TOKENS[i : i + 2], *widths[i : i + 2]) for i in range(3)]
        )
        self.vertices = nn.Linear(self.WIDTHS[-1], 3)
        nn.init.zeros_(self.points.bias)
        nn.init.normal_(self.points.weight, std=0.001)
        nn.init.normal_(self.vertices.weight, std=0.001)
        # A regressor of zeros is not known yet.
        self.register_buffer('regressor', torch.zeros(21, 778))
        self.register_buffer('faces', torch.zeros(1538, 3, dtype=torch.long))

    def read_hand_model(self) -> None:
        """Take regressor and triangles from the hand model.

        Raises:
            FastViTError: see :func:`.hand_model.read_hand_model`.
        """
        hand = read_hand_model(self.hand_model)
        self.regressor.copy_(torch.tensor(hand.joint_regressor()))
        self.faces.copy_(torch.tensor(hand.f))

    def forward(self, feats: Features) -> Hand:
        x = feats[-1]
        points = self.points(x.mean((2, 3))).unflatten(1, (21, 2))
        grid = points[:, :, None]  # B, 21, 1, 2
        places = self.positions.expand(x.shape[0], -1, -1, -1)
        tokens = sample_at(self.upsample(x), grid) + sample_at(places, grid)
        verts = self.vertices(self.stages(tokens))
        return Hand(verts, self.regressor @ verts, points)

    def predict(self, feats: Features, samples: list[HandSample]) -> list[HandSample]:
        if not self.regressor.any():
            raise FastViTError('this model was never trained: it has no joint regressor')
        return super().predict(feats, samples)

    def loss(self, feats: Features, samples: list[HandSample]) -> dict[str, Tensor]:
        hand, target = self(feats), self.targets(samples)
        return {
            f'loss_{name}': self.weights[name] * F.l1_loss(getattr(hand, name), value)
            for name, value in target._asdict().items()
        }


def sample_at(x: Tensor, grid: Tensor) -> Tensor:
    """Features (B, N, C) of a map (B, C, H, W) at points (B, N, 1, 2) in [-1, 1]."""
    sampled = F.grid_sample(x, grid, padding_mode='border', align_corners=False)
    return sampled[..., 0].transpose(1, 2)
