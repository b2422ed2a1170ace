# Image embeddings, and zero-shot classification by texts: model.head.texts=FILE
_base_ = '../../_base_/runtime.py'
custom_imports = dict(imports=['fastvit_mm.zero_shot'])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='FastViT', out_indices=(3,)),
    neck=dict(type='FastViTNeck', in_channels=512, projection=512),
    head=dict(type='ZeroShotHead', texts=None),
)
data_preprocessor = dict(type='ClsDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3, to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # Crop ratio 0.95: 256 / 0.95, as timm has it for these weights.
    dict(type='ResizeEdge', scale=269, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=256),
    dict(type='PackInputs'),
]
test_dataloader = dict(
    batch_size=128,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ImageNet', data_root='data/imagenet', split='val', pipeline=test_pipeline),
)
test_evaluator = dict(type='Accuracy', topk=(1, 5))
test_cfg = dict()
custom_hooks = [dict(type='ZeroShotTestHook')]
default_hooks = dict(visualization=dict(type='VisualizationHook', enable=False))
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
default_scope = 'mmpretrain'
