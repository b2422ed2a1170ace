# Boxes and masks of one's own in COCO's format: Mask R-CNN. `fastvit init` writes a config that adds
# what depends on them: paths, classes, sizes, schedule.
_base_ = ['mask_rcnn_fastvit.py', 'coco.py', 'schedule_1x.py']

train_dataloader = dict(dataset=dict(filter_cfg=dict(min_size=1)))
default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'))
