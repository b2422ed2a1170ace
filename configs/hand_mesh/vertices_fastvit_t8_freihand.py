# torchrun --nproc-per-node 8 tools/train.py configs/hand_mesh/vertices_fastvit_t8_freihand.py --launcher pytorch
# Written for 8 GPUs with 32 images each. The paper has no such head.
_base_ = ['_base_/vertices_fastvit.py', '_base_/freihand_iters.py', '_base_/schedule_vertices.py']
model = dict(
    init_cfg=dict(type='Pretrained', checkpoint='fastvit_t8.apple_in1k'),
    backbone=dict(arch='t8'),
    neck=dict(in_channels=384),
    head=dict(in_channels=768),
)
