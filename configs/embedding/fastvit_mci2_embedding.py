# python tools/infer.py configs/embedding/fastvit_mci2_embedding.py fastvit_mci2.apple_mclip2_dfndr2b IMAGES --out OUT --json
# Zero-shot top-1 on ImageNet, as published: 74.4 (MobileCLIP S2), 77.2 (MobileCLIP2 S2) %.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = '_base_/mobileclip.py'
model = dict(
    backbone=dict(arch='mci2'),
    neck=dict(in_channels=640),
)
