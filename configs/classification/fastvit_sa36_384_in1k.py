# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_sa36_384_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 64 images each, starting from the weights trained at 256 x 256. The paper reports no figure for it.
_base_ = ['_base_/fastvit.py', '_base_/imagenet_384_crop95.py', '_base_/schedule_30e.py']
model = dict(
    backbone=dict(arch='sa36', drop_path_rate=0.2),
    init_cfg=dict(type='Pretrained', checkpoint='fastvit_sa36.apple_in1k'),
)
