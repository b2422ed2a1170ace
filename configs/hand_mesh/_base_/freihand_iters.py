# For runs counted in iterations.
_base_ = 'freihand.py'
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
