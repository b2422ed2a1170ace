from .archs import ARCHS
from .fastvit import FastViT
from .fastvit_neck import FastViTNeck

__all__ = ['ARCHS', 'FastViT', 'FastViTNeck']
