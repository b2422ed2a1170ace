# ImageNet-1k at 256 x 256: 1024 images per iteration.
dataset = dict(type='ImageNet', data_root='data/imagenet')
bgr_mean, bgr_std = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    # Fast...: faster versions of mmpretrain's.
    dict(type='FastRandomResizedCrop', scale=256, backend='pillow', interpolation='bicubic'),
    dict(type='FastRandomFlip', prob=0.5, direction='horizontal'),
    # timm's rand-m9-mstd0.5-inc1. The recipe's colour jitter has no effect there: timm ignores
    # it when RandAugment is used.
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
    ),
    # timm's "pixel" mode: noise of unit variance after normalization.
    dict(
        type='FastRandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=bgr_mean,
        fill_std=bgr_std,
    ),
    dict(type='FastPackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # Crop ratio 0.9: 256 / 0.9.
    dict(type='ResizeEdge', scale=284, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=256),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),  # a worker returns one tensor per batch
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**dataset, split='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, split='val', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
