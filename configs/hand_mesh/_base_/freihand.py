# FreiHAND v2 at 224 x 224: 256 images an iteration, augmented as METRO does.
dataset = dict(type='FreiHAND', data_root='data/freihand')

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='FitHand', scale=224),
    dict(type='RandomHandView', rotation=90, rotation_prob=0.4, zoom=0.25, shift=0.05),
    dict(type='RandomChannelNoise', noise=0.4),
    dict(type='PackHand'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='FitHand', scale=224),
    dict(type='PackHand'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**dataset, split='training', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, split='evaluation', pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
# pred_file='pred.json' writes the challenge's file.
val_evaluator = dict(type='HandMeshMetric')
test_evaluator = val_evaluator
