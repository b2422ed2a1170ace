# torchrun --nproc-per-node 8 tools/train.py configs/segmentation/fpn_fastvit_mci1_ade20k.py --launcher pytorch
# Written for 8 GPUs with 4 images each. MobileCLIP's paper reports no figure for it.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = ['_base_/fpn_mobileclip.py', '_base_/ade20k.py', '_base_/schedule_40k.py']
model = dict(
    backbone=dict(
        arch='mci1',
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_mci1.apple_mclip'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
