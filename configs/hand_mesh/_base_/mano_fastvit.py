# The paper's head: pooled features give camera, pose and shape, MANO the mesh.
model = dict(
    type='HandMesh',
    data_preprocessor=dict(
        type='ImgDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(type='FastViT', out_indices=(3,)),
    neck=dict(type='FastViTNeck', in_channels=512),
    head=dict(type='ManoHead', in_channels=1024, hand_model='data/mano/MANO_RIGHT.pkl'),
)
