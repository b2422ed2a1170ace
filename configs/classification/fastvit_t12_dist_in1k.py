# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_t12_dist_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 128 images each. The paper: 80.3 % top-1, distilled from RegNetY-16GF.
_base_ = 'fastvit_t12_in1k.py'
custom_imports = dict(imports=['fastvit_mm.models.distillation', 'fastvit_mm.transforms'])
model = dict(
    type='DistilledImageClassifier',
    teacher=dict(
        type='TimmClassifier', model_name='regnety_160.deit_in1k', pretrained=True, num_classes=1000
    ),
)
