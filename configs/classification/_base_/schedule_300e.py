# 5 epochs of warm-up, cosine until epoch 300, then 10 epochs at the minimum rate.
_base_ = 'runtime.py'

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=295, eta_min=1e-5, begin=5, end=300),
]
train_cfg = dict(by_epoch=True, max_epochs=310, val_interval=1)
val_cfg = dict()
test_cfg = dict()
custom_hooks = [
    # timm averages the BatchNorm statistics as well,
    dict(type='EMAHook', momentum=5e-4, update_buffers=True, priority='ABOVE_NORMAL'),
    # and those of all GPUs after every epoch.
    dict(type='SyncStatisticsHook'),
]
# Each GPU draws its own mixtures and drops its own blocks: seed 42 + rank, as in timm.
randomness = dict(diff_rank_seed=True)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
default_hooks = dict(
    checkpoint=dict(save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook', enable=False),
)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
default_scope = 'mmpretrain'
