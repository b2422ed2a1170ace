# torchrun --nproc-per-node 8 tools/train.py configs/segmentation/fpn_fastvit_mci3_ade20k.py --launcher pytorch
# Written for 8 GPUs with 4 images each. MobileCLIP's paper reports no figure for it.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = ['_base_/fpn_mobileclip.py', '_base_/ade20k.py', '_base_/schedule_40k.py']
model = dict(
    data_preprocessor=dict(  # CLIP's
        mean=[122.770938, 116.7460125, 104.09373615],
        std=[68.5005327, 66.6321579, 70.32316305],
    ),
    backbone=dict(
        arch='mci3',
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_mci3.apple_mclip2_dfndr2b'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
