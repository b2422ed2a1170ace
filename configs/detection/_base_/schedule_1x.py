# 12 epochs, AdamW, steps at 8 and 11.
_base_ = '../../_base_/runtime.py'
custom_imports = dict(imports=['fastvit_mm.data.coco'])

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    checkpoint=dict(save_best='coco/bbox_mAP'), visualization=dict(type='DetVisualizationHook')
)
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
env_cfg = dict(cudnn_benchmark=False)  # batches rarely have the same shape
# Each GPU keeps its own BatchNorm statistics: average them.
custom_hooks = [dict(type='SyncStatisticsHook')]
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_scope = 'mmdet'
