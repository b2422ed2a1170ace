# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_t8_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 128 images each. The paper: 76.2 % top-1.
_base_ = ['_base_/fastvit.py', '_base_/imagenet_256.py', '_base_/schedule_300e.py']
model = dict(
    backbone=dict(arch='t8'),
    neck=dict(in_channels=384),
    head=dict(in_channels=768),
)
