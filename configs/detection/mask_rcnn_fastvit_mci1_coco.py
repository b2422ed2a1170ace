# torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_fastvit_mci1_coco.py --launcher pytorch
# Written for 8 GPUs with 2 images each. MobileCLIP's paper reports no figure for it.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = ['_base_/mask_rcnn_mobileclip.py', '_base_/coco.py', '_base_/schedule_1x.py']
model = dict(
    backbone=dict(
        arch='mci1',
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_mci1.apple_mclip'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
