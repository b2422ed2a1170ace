# torchrun --nproc-per-node 8 tools/train.py configs/hand_mesh/vertices_fastvit_ma36_freihand.py --launcher pytorch
# Written for 8 GPUs with 32 images each. Published with this head: 5.7 mm PA-MPJPE, 6.0 mm PA-MPVPE, F@5 0.772, F@15 0.986. The paper has no such head.
_base_ = ['_base_/vertices_fastvit.py', '_base_/freihand_iters.py', '_base_/schedule_vertices.py']
model = dict(
    init_cfg=dict(type='Pretrained', checkpoint='fastvit_ma36.apple_in1k'),
    backbone=dict(arch='ma36'),
    neck=dict(in_channels=608),
    head=dict(in_channels=1216),
)
