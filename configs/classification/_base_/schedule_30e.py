# Fine-tuning: 30 epochs, a low rate, almost no weight decay.
_base_ = 'schedule_300e.py'

optim_wrapper = dict(optimizer=dict(lr=5e-5, weight_decay=1e-8))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=25, eta_min=1e-5, begin=5, end=30),
]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)
