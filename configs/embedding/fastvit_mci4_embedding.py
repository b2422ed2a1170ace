# python tools/infer.py configs/embedding/fastvit_mci4_embedding.py fastvit_mci4.apple_mclip2_dfndr2b IMAGES --out OUT --json
# Zero-shot top-1 on ImageNet, as published: 81.9 (MobileCLIP2 S4) %.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = '_base_/mobileclip.py'
data_preprocessor = dict(  # CLIP's
    mean=[122.770938, 116.7460125, 104.09373615],
    std=[68.5005327, 66.6321579, 70.32316305],
)
model = dict(
    backbone=dict(arch='mci4', out_indices=(4,)),
    neck=dict(in_channels=2048, projection=768),
)
