# Vertices from features at 21 image points, no hand model.
_base_ = 'mano_fastvit.py'
model = dict(neck=dict(type='FastViTFeatures'), head=dict(type='VertexHead'))
