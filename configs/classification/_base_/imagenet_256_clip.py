# As MobileCLIP resizes test images: the short side to 256 pixels, bilinear.
_base_ = 'imagenet_256.py'

test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 256
test_pipeline[1].interpolation = 'bilinear'
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
