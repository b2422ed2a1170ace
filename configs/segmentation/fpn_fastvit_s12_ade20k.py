# torchrun --nproc-per-node 8 tools/train.py configs/segmentation/fpn_fastvit_s12_ade20k.py --launcher pytorch
# Written for 8 GPUs with 4 images each. The paper has no S12 row; SA12 is its smallest.
_base_ = ['_base_/fpn_fastvit.py', '_base_/ade20k.py', '_base_/schedule_40k.py']
model = dict(
    backbone=dict(
        arch='s12',
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_s12.apple_in1k'),
    ),
)
