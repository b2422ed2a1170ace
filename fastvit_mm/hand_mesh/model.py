"""The whole model: backbone, neck, head."""

import torch.nn as nn
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor

from .heads import Features, Hand, ManoHead
from .transforms import HandSample


@MODELS.register_module()
class HandMesh(BaseModel):
    """A hand in an image: (B, 3, H, W) to a mesh.

    Args:
        backbone, neck, head: configs; ``head`` is a :class:`HandHead`.
        data_preprocessor: mmengine's ``ImgDataPreprocessor``.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        neck: dict | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        self.neck = MODELS.build(neck) if neck else None
        self.head = MODELS.build(head)

    def init_weights(self) -> None:
        super().init_weights()  # which goes no further where the weights are pretrained
        self.head.read_hand_model()

    def export_graph(self) -> type:
        """What is exported, see :func:`fastvit_mm.export.graphs.kind_of`."""
        from .export import ManoMesh, VertexMesh

        return ManoMesh if isinstance(self.head, ManoHead) else VertexMesh

    def extract_feat(self, inputs: Tensor) -> Features:
        feats = self.backbone(inputs)
        return feats if self.neck is None else self.neck(feats)

    def forward(
        self, inputs: Tensor, data_samples: list[HandSample] | None = None, mode: str = 'tensor'
    ) -> Hand | dict[str, Tensor] | list[HandSample]:
        """``tensor``: a :class:`Hand`; ``loss``: losses; ``predict``: samples with predictions."""
        feats = self.extract_feat(inputs)
        if mode == 'loss':
            return self.head.loss(feats, data_samples)
        if mode == 'predict':
            return self.head.predict(feats, data_samples)
        return self.head(feats)
