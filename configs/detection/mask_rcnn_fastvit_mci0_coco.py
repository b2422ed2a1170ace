# torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_fastvit_mci0_coco.py --launcher pytorch
# Written for 8 GPUs with 2 images each. MobileCLIP's paper reports no figure for it.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = ['_base_/mask_rcnn_mobileclip.py', '_base_/coco.py', '_base_/schedule_1x.py']
model = dict(
    backbone=dict(
        arch='mci0',
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_mci0.apple_mclip2_dfndr2b'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
