# torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_fastvit_sa24_coco.py --launcher pytorch
# Written for 8 GPUs with 2 images each. The paper: 42.0 box AP, 38.0 mask AP.
_base_ = ['_base_/mask_rcnn_fastvit.py', '_base_/coco.py', '_base_/schedule_1x.py']
model = dict(
    backbone=dict(
        arch='sa24',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='fastvit_sa24.apple_in1k'),
    ),
)
