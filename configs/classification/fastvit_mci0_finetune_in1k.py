# torchrun --nproc-per-node 8 tools/train.py configs/classification/fastvit_mci0_finetune_in1k.py --launcher pytorch --amp
# Written for 8 GPUs with 128 images each. MobileCLIP's paper reports no figure for it.
# Its weights are for research only (Apple's AMLR licence), and so is what is trained from them.
_base_ = ['_base_/mobileclip.py', '_base_/imagenet_256_clip.py', '_base_/schedule_30e.py']
model = dict(
    backbone=dict(arch='mci0'),
    init_cfg=dict(type='Pretrained', checkpoint='fastvit_mci0.apple_mclip2_dfndr2b'),
)
auto_scale_lr = dict(base_batch_size=1024)
