"""3D hand meshes on FreiHAND (section 4.3 of the paper), on mmengine alone.

The pattern for a further task: importing this package registers its models, data set, transforms
and metric; configs name it in ``custom_imports``.
"""

from .freihand import FreiHAND
from .hand_model import HandLayer, HandModel, read_hand_model
from .heads import FastViTFeatures, Hand, ManoHead, VertexHead
from .metric import HandMeshMetric, align, evaluate
from .model import HandMesh
from .transforms import FitHand, HandSample, PackHand, RandomChannelNoise, RandomHandView

__all__ = [
    'FastViTFeatures',
    'FitHand',
    'FreiHAND',
    'Hand',
    'HandLayer',
    'HandMesh',
    'HandMeshMetric',
    'HandModel',
    'HandSample',
    'ManoHead',
    'PackHand',
    'RandomChannelNoise',
    'RandomHandView',
    'VertexHead',
    'align',
    'evaluate',
    'read_hand_model',
]
