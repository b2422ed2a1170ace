# Images and masks of one's own, listed in files of lines "image<tab>mask". `fastvit init` writes a
# config that adds what depends on them: paths, classes, ids, sizes, schedule.
_base_ = ['fpn_fastvit.py', 'ade20k.py', 'schedule_40k.py']
custom_imports = dict(imports=['fastvit_mm.data.mask_pairs'])

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[1] = dict(type='MappedLoadAnnotations')
train_pipeline[2].ratio_range = (0.8, 1.5)
test_pipeline[2] = dict(type='MappedLoadAnnotations')
train_dataloader = dict(
    drop_last=True,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(_delete_=True, type='MaskPairs', pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(_delete_=True, type='MaskPairs', pipeline=test_pipeline))
test_dataloader = val_dataloader
# Counted in epochs; the base counts iterations.
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=100)
default_hooks = dict(logger=dict(log_metric_by_epoch=True), checkpoint=dict(by_epoch=True))
log_processor = dict(by_epoch=True)
