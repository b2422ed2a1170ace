# 200 times 256 iterations, AdamW, rate / 10 at half, gradients clipped.
_base_ = 'runtime.py'

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=1e-2),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='MultiStepLR', milestones=[25600], gamma=0.1, begin=0, end=51200, by_epoch=False)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=51200, val_interval=2560)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False), checkpoint=dict(by_epoch=False, interval=2560)
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=256)
