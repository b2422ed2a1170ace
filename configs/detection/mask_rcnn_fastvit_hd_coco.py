# torchrun --nproc-per-node 8 tools/train.py configs/detection/mask_rcnn_fastvit_hd_coco.py --launcher pytorch
# Written for 8 GPUs with 2 images each. FastVLM's paper reports no figure for it.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
# wget https://ml-site.cdn-apple.com/datasets/fastvlm/llava-fastvithd_0.5b_stage3.zip && unzip -d checkpoints llava-*.zip
# The weights are published without branches, so the network trains in the deploy form.
_base_ = ['_base_/mask_rcnn_mobileclip.py', '_base_/coco.py', '_base_/schedule_1x.py']
model = dict(
    backbone=dict(
        arch='hd',
        deploy=True,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/llava-fastvithd_0.5b_stage3'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
