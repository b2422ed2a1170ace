# torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_fastvit_s12_coco.py --launcher pytorch
# Written for 8 GPUs with 2 images each. The paper has no S12 row; SA12 is its smallest.
_base_ = ['_base_/mask_rcnn_fastvit.py', '_base_/coco.py', '_base_/schedule_1x.py']
model = dict(
    backbone=dict(
        arch='s12',
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_s12.apple_in1k'),
    ),
)
