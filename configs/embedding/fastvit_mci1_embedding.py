# python tools/infer.py configs/embedding/fastvit_mci1_embedding.py fastvit_mci1.apple_mclip IMAGES --out OUT --json
# Zero-shot top-1 on ImageNet, as published: 72.6 (MobileCLIP S1) %.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = '_base_/mobileclip.py'
model = dict(
    backbone=dict(arch='mci1'),
)
