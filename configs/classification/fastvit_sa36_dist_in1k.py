# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_sa36_dist_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 128 images each. The paper: 84.2 % top-1, distilled from RegNetY-16GF.
_base_ = 'fastvit_sa36_in1k.py'
custom_imports = dict(imports=['fastvit_mm.models.distillation', 'fastvit_mm.transforms'])
model = dict(
    type='DistilledImageClassifier',
    backbone=dict(drop_path_rate=0.1),
    teacher=dict(
        type='TimmClassifier', model_name='regnety_160.deit_in1k', pretrained=True, num_classes=1000
    ),
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)],
    ),
)
