# python tools/infer.py configs/embedding/fastvit_mci0_embedding.py fastvit_mci0.apple_mclip2_dfndr2b IMAGES --out OUT --json
# Zero-shot top-1 on ImageNet, as published: 67.8 (MobileCLIP S0), 71.5 (MobileCLIP2 S0) %.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = '_base_/mobileclip.py'
model = dict(
    backbone=dict(arch='mci0'),
)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = 256  # crop ratio 1 with these weights
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
