"""3D hand meshes on FreiHAND (section 4.3 of the paper), on mmengine alone.

The pattern for a further task: importing this package registers its models, data set, transforms
and metric; configs name it in ``custom_imports``.
"""

from .hand_model import HandLayer, HandModel, read_hand_model
from .metric import HandMeshMetric, align, evaluate

__all__ = ['HandLayer', 'HandMeshMetric', 'HandModel', 'align', 'evaluate', 'read_hand_model']
