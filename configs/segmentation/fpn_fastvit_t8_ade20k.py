# torchrun --nproc-per-node 8 tools/train.py configs/segmentation/fpn_fastvit_t8_ade20k.py --launcher pytorch
# Written for 8 GPUs with 4 images each. The paper has no T8 row; SA12 is its smallest.
_base_ = ['_base_/fpn_fastvit.py', '_base_/ade20k.py', '_base_/schedule_40k.py']
model = dict(
    backbone=dict(
        arch='t8',
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_t8.apple_in1k'),
    ),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
