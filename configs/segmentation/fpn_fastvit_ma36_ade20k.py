# torchrun --nproc-per-node 8 tools/train.py configs/segmentation/fpn_fastvit_ma36_ade20k.py --launcher pytorch
# Written for 8 GPUs with 4 images each. The paper: 44.6 mIoU.
_base_ = ['_base_/fpn_fastvit.py', '_base_/ade20k.py', '_base_/schedule_40k.py']
model = dict(
    backbone=dict(
        arch='ma36',
        drop_path_rate=0.35,
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_ma36.apple_in1k'),
    ),
    neck=dict(in_channels=[76, 152, 304, 608]),
)
