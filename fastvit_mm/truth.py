"""A tested sample as :func:`fastvit_mm.pictures.compare` takes it: truth and prediction."""

import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor

from fastvit_mm import pictures


def prediction_of(sample: BaseDataElement, faces: Tensor | None, score: float):
    """What was predicted.

    Args:
        faces: triangles of a hand.
        score: least score of a box.
    """
    if 'pred_xyz' in sample:
        from fastvit_mm.hand_mesh.inference import in_original

        return in_original(sample, faces)
    if 'pred_instances' in sample:
        found = sample.pred_instances.cpu()
        return type(sample)(pred_instances=found[found.scores >= score])
    if 'pred_score' in sample:
        return dict(pred_scores=sample.pred_score.cpu().numpy())
    return sample


def truth_of(sample: BaseDataElement, meta: dict, faces: Tensor | None = None):
    """What is true: the name of a class, or what is drawn like a prediction; None if it is not
    known."""
    if 'gt_label' in sample:
        labels = np.atleast_1d(sample.gt_label.cpu().numpy()).tolist()
        return ', '.join(pictures.class_name(meta, label) for label in labels)
    if 'gt_sem_seg' in sample:
        return type(sample)(gt_sem_seg=sample.gt_sem_seg)
    if 'gt_instances' in sample and 'bboxes' in sample.gt_instances:
        return type(sample)(pred_instances=plain_instances(sample.gt_instances))
    if 'xyz' in sample and 'verts' in sample:
        return true_hand(sample, faces)
    return None


def plain_instances(objects: InstanceData) -> InstanceData:
    """Boxes (N, 4), labels (N,) and masks (N, H, W), if there are any, as tensors."""
    from mmdet.structures.bbox import get_box_tensor

    boxes = get_box_tensor(objects.bboxes).cpu()
    plain = InstanceData(bboxes=boxes, labels=torch.as_tensor(objects.labels).cpu())
    if 'masks' in objects:
        masks = objects.masks
        masks = masks if isinstance(masks, Tensor) else masks.to_ndarray()
        plain.masks = torch.as_tensor(masks).bool()
    return plain


def true_hand(sample: BaseDataElement, faces: Tensor | None):
    """The hand under the names of a prediction, relative to its wrist."""
    from fastvit_mm.hand_mesh.hand_model import WRIST
    from fastvit_mm.hand_mesh.inference import in_original

    one = sample.cpu()
    root = one.xyz[WRIST]
    one.pred_xyz, one.pred_verts, one.pred_uv = one.xyz - root, one.verts - root, one.uv
    return in_original(one, faces)
