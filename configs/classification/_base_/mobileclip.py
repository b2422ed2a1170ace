# MobileCLIP's preprocessing: RGB / 255.
_base_ = 'fastvit.py'
data_preprocessor = dict(mean=[0.0] * 3, std=[255.0] * 3)
