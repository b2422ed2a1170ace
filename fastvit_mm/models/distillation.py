"""Hard distillation: the teacher's top class is a second label (Touvron et al., 2021).

This is a separate module because it needs mmpretrain: configs list it in ``custom_imports``.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS

from fastvit_mm.errors import FastViTError, one_line


class Frozen:
    """Hides a module from ``parameters()``, ``state_dict()`` and copies for EMA."""

    def __init__(self, module: nn.Module):
        self.module = module.eval().requires_grad_(False)

    def __deepcopy__(self, memo):
        return self


@MODELS.register_module()
class DistilledImageClassifier(ImageClassifier):
    """mmpretrain's ImageClassifier with a teacher: 0.5 * its own loss + 0.5 * cross-entropy
    with the argmax of the teacher's logits on the same augmented images.

    The teacher is never trained, stays in eval mode, and is neither in the checkpoint nor in the
    optimizer, so that checkpoints are those of the plain classifier.

    Args:
        teacher: config of a classifier with the same classes and normalization; None only to test.
        weight: weight of the teacher's loss, in [0, 1]; the classifier's own loss has the rest.

    Raises:
        FastViTError: the teacher cannot be built, or there is none in training.
    """

    def __init__(self, *args, teacher: dict | None = None, weight: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = weight
        self.teacher = None
        if teacher is not None:
            try:
                module = MMPRETRAIN_MODELS.build(teacher)
                if teacher.get('init_cfg'):
                    module.init_weights()
            except Exception as error:
                name = teacher.get('model_name', teacher['type'])
                raise FastViTError(
                    f'the teacher {name} cannot be built ({one_line(error)}): it needs timm, and '
                    "its weights from the internet or huggingface_hub's cache"
                ) from error
            self.teacher = Frozen(module)

    @torch.no_grad()
    def teach(self, inputs: torch.Tensor) -> torch.Tensor:
        """The teacher's class, (B,), for each image of (B, 3, H, W)."""
        if self.teacher is None:
            raise FastViTError('distillation needs a teacher: set model.teacher')
        module = self.teacher.module
        if next(module.parameters()).device != inputs.device:
            module.to(inputs.device)
        return module(inputs, mode='tensor').argmax(1)

    def loss(self, inputs: torch.Tensor, data_samples: list) -> dict:
        feats = self.extract_feat(inputs)
        own = self.head.loss(feats, data_samples)['loss']
        taught = F.cross_entropy(self.head(feats), self.teach(inputs))
        return dict(
            loss_own=(1 - self.weight) * own,
            loss_teacher=self.weight * taught,
        )
