# MobileCLIP's preprocessing: RGB / 255.
_base_ = 'fpn_fastvit.py'
model = dict(data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3))
