# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_ma36_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 128 images each. The paper: 83.9 % top-1.
_base_ = ['_base_/fastvit.py', '_base_/imagenet_256_crop95.py', '_base_/schedule_300e.py']
model = dict(
    backbone=dict(arch='ma36', drop_path_rate=0.35),
    neck=dict(in_channels=608),
    head=dict(in_channels=1216),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)],
    ),
)
