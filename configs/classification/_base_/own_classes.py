# Images of one's own classes, listed in files of lines "path label". `fastvit init` writes a config
# that adds what depends on them: paths, classes, sizes, schedule.
_base_ = ['fastvit.py', 'imagenet_256.py', 'schedule_300e.py']

# ImageNet's augmentation with larger crops, and no mixed images, which need longer schedules.
model = dict(head=dict(topk=(1,)), train_cfg=dict(augments=None))
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[1].crop_ratio_range = (0.5, 1.0)
train_dataloader = dict(
    pin_memory=False,  # without a GPU it would only warn
    dataset=dict(_delete_=True, type='CustomDataset', data_prefix='', pipeline=train_pipeline),
)
val_dataloader = dict(
    pin_memory=False,
    dataset=dict(_delete_=True, type='CustomDataset', data_prefix='', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
custom_hooks = [
    # An average over the last tenth of the iterations so far, at most the last 2000: short runs
    # leave their start behind.
    dict(
        type='EMAHook',
        ema_type='MomentumAnnealingEMA',
        momentum=5e-4,
        gamma=10,
        update_buffers=True,
        priority='ABOVE_NORMAL',
    ),
    dict(type='SyncStatisticsHook'),
]
