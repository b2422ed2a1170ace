# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_sa24_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 128 images each. The paper: 82.7 % top-1.
_base_ = ['_base_/fastvit.py', '_base_/imagenet_256.py', '_base_/schedule_300e.py']
model = dict(
    backbone=dict(arch='sa24', drop_path_rate=0.1),
)
