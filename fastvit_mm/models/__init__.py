from .fastvit import ARCHS, FastViT
from .fastvit_neck import FastViTNeck

__all__ = ['ARCHS', 'FastViT', 'FastViTNeck']
