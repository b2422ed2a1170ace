# Evaluation crop ratio 0.95 instead of 0.9: 384 / 0.95.
_base_ = 'imagenet_384.py'

test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 404
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
