# torchrun --nproc-per-node 8 tools/train.py configs/hand_mesh/mano_fastvit_ma36_freihand.py --launcher pytorch
# Written for 8 GPUs with 32 images each. The paper: 6.6 mm PA-MPJPE, 6.7 mm PA-MPVPE, F@5 0.722, F@15 0.981.
_base_ = ['_base_/mano_fastvit.py', '_base_/freihand.py', '_base_/schedule_mano.py']
model = dict(
    init_cfg=dict(type='Pretrained', checkpoint='fastvit_ma36.apple_in1k'),
    backbone=dict(arch='ma36'),
    neck=dict(in_channels=608),
    head=dict(in_channels=1216),
)
