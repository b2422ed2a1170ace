# torchrun --nproc-per-node 8 tools/train.py configs/segmentation/fpn_fastvit_sa36_ade20k.py --launcher pytorch
# Written for 8 GPUs with 4 images each. The paper: 42.9 mIoU.
_base_ = ['_base_/fpn_fastvit.py', '_base_/ade20k.py', '_base_/schedule_40k.py']
model = dict(
    backbone=dict(
        arch='sa36',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_sa36.apple_in1k'),
    ),
)
