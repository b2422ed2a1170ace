# torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_fastvit_t12_coco.py --launcher pytorch
# Written for 8 GPUs with 2 images each. The paper has no T12 row; SA12 is its smallest.
_base_ = ['_base_/mask_rcnn_fastvit.py', '_base_/coco.py', '_base_/schedule_1x.py']
model = dict(
    backbone=dict(
        arch='t12',
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_t12.apple_in1k'),
    ),
)
