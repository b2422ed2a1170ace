# torchrun --nproc-per-node 8 tools/train.py configs/hand_mesh/mano_fastvit_sa12_freihand.py --launcher pytorch
# Written for 8 GPUs with 32 images each. The paper has no SA12 row; MA36 is its only one.
_base_ = ['_base_/mano_fastvit.py', '_base_/freihand.py', '_base_/schedule_mano.py']
model = dict(
    init_cfg=dict(type='Pretrained', checkpoint='fastvit_sa12.apple_in1k'),
    backbone=dict(arch='sa12'),
    neck=dict(in_channels=512),
    head=dict(in_channels=1024),
)
