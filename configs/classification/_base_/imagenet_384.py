# Fine-tuning at 384 x 384: 512 images per iteration, crop ratio 0.9.
_base_ = 'imagenet_256.py'

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[1].scale = 384
test_pipeline[1].scale = 426  # 384 / 0.9, rounded down as timm does
test_pipeline[2].crop_size = 384
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
