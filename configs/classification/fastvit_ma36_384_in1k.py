# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_ma36_384_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 64 images each, starting from the weights trained at 256 x 256. The paper reports no figure for it.
_base_ = ['_base_/fastvit.py', '_base_/imagenet_384_crop95.py', '_base_/schedule_30e.py']
model = dict(
    backbone=dict(arch='ma36', drop_path_rate=0.35),
    neck=dict(in_channels=608),
    head=dict(in_channels=1216),
    init_cfg=dict(type='Pretrained', checkpoint='fastvit_ma36.apple_in1k'),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)],
    ),
)
