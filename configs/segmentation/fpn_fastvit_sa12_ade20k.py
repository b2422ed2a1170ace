# torchrun --nproc-per-node 8 tools/train.py configs/segmentation/fpn_fastvit_sa12_ade20k.py --launcher pytorch
# Written for 8 GPUs with 4 images each. The paper: 38.0 mIoU.
_base_ = ['_base_/fpn_fastvit.py', '_base_/ade20k.py', '_base_/schedule_40k.py']
model = dict(
    backbone=dict(
        arch='sa12',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_sa12.apple_in1k'),
    ),
)
