# Linear probing: 30 epochs of SGD, cosine, no weight decay; all statistics stay.
_base_ = 'schedule_300e.py'

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.4, momentum=0.9, weight_decay=0.0),
)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=30, begin=0, end=30)]
train_cfg = dict(max_epochs=30)
custom_hooks = []
