"""3D hand meshes on FreiHAND (section 4.3 of the paper), on mmengine alone.

The pattern for a further task: importing this package registers its models, data set, transforms
and metric; configs name it in ``custom_imports``.
"""

from .metric import HandMeshMetric, align, evaluate

__all__ = ['HandMeshMetric', 'align', 'evaluate']
