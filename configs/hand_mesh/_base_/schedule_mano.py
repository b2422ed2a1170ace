# METRO's: Adam, rate / 10 at half of 200 epochs.
_base_ = 'runtime.py'

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=1e-4))
param_scheduler = [dict(type='MultiStepLR', milestones=[100], gamma=0.1, begin=0, end=200)]
train_cfg = dict(by_epoch=True, max_epochs=200, val_interval=1)
auto_scale_lr = dict(base_batch_size=256)
