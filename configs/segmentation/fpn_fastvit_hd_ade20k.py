# torchrun --nproc-per-node 8 tools/train.py configs/segmentation/fpn_fastvit_hd_ade20k.py --launcher pytorch
# Written for 8 GPUs with 4 images each. FastVLM's paper reports no figure for it.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
# wget https://ml-site.cdn-apple.com/datasets/fastvlm/llava-fastvithd_0.5b_stage3.zip && unzip -d checkpoints llava-*.zip
# The weights are published without branches, so the network trains in the deploy form.
_base_ = ['_base_/fpn_mobileclip.py', '_base_/ade20k.py', '_base_/schedule_40k.py']
model = dict(
    backbone=dict(
        arch='hd',
        deploy=True,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/llava-fastvithd_0.5b_stage3'),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
