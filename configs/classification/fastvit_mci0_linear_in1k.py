# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_mci0_linear_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 128 images each. MobileCLIP's paper reports no figure for it.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
# Linear probing: only the last layer is trained.
_base_ = ['_base_/mobileclip.py', '_base_/imagenet_256_clip.py', '_base_/schedule_linear_30e.py']
model = dict(
    backbone=dict(arch='mci0', frozen_stages=4),
    neck=dict(frozen=True),
    init_cfg=dict(type='Pretrained', checkpoint='fastvit_mci0.apple_mclip2_dfndr2b'),
    train_cfg=dict(augments=None),
)
