# As timm resizes test images for MobileCLIP2's MCi0: crop ratio 1.
_base_ = 'imagenet_256.py'

test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 256
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
