"""The demo form of any config: same model, losses, optimizer and metric, sized for two cores."""

from math import ceil, floor
from pathlib import Path

from mmengine.config import ConfigDict

from fastvit_mm.errors import FastViTError

from .scenes import CLASSES, LAYOUTS, PALETTE, SCENE_CLASSES, make_data

# Settings by default_scope. `shrink`: factor of every size in pixels. `batch`, `iters` and `lr`
# belong together: so few iterations need larger steps than the config's schedule. `cosine`: instead
# of the config's schedule, which lowers the rate too early for a short run.
DEMOS = {
    'mmpretrain': dict(data='imagenet', shrink=1 / 4, batch=32, iters=420, lr=2e-3),  # 256 to 64
    'mmdet': dict(data='coco', shrink=0.08, batch=4, iters=800, lr=3e-4),  # short side 800 to 64
    'mmseg': dict(data='ade20k', shrink=1 / 8, batch=8, iters=340, lr=2e-3),  # 512 to 64
    'mmengine': dict(data='freihand', shrink=64 / 224, batch=16, iters=2600, lr=1e-3, cosine=True),
}
# The paper's head for hands: an iteration takes half the time, and larger steps do.
HEADS = {'ManoHead': dict(iters=4800, lr=2e-3)}
WARMUP = 0.05  # of the run, if the config warms up: in proportion it would be a few iterations
MAX_ROIS = 16  # regions per image: the config's number is for an area 150 times as large
MAX_BOXES = 200  # proposals per image, for the same reason


def apply_demo(cfg, root='data/demo'):
    """Turn `cfg`, an mmengine Config for any of the four tasks, into its demo form and return it.

    Generates the data set it needs under `root` unless it exists. Leaves a config alone that
    already has its demo form, such as the one that a demo run saves in its work folder.
    """
    scope = cfg.get('default_scope')
    if scope not in DEMOS:
        raise FastViTError(f'no demo for default_scope {scope!r}: one of {", ".join(DEMOS)}')
    demo = DEMOS[scope] | HEADS.get(cfg.model.get('head', {}).get('type'), {})
    number = draw(root, demo['data'])
    if cfg.get('demo'):
        return cfg
    cfg.demo = True
    for node in dicts(cfg._cfg_dict):
        shrink_model(node, len(SCENE_CLASSES if scope == 'mmseg' else CLASSES))
        shrink_sizes(node, demo['shrink'])
        soften_augmentation(node)
    cfg.load_from = None
    use_data(cfg, demo, Path(root, demo['data']))
    retime(cfg, demo, number)
    return cfg


def draw(root, name):
    """Draw a data set under `root` unless it is there; the number of its training images."""
    if name in LAYOUTS:
        make_data(root, [name])
        return LAYOUTS[name]['images'][0]
    from fastvit_mm.hand_mesh.demo_data import SPEC, make_freihand

    make_freihand(Path(root, name))
    return 4 * SPEC['hands'][0]


def dicts(root):
    """Every dict in a config, the root first; an object that two keys share comes once."""
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            yield node
            todo.extend(node.values())
        elif isinstance(node, (list, tuple)):
            todo.extend(node)


def shrink_model(node, num_classes):
    """Heads for the demo's classes, no downloaded weights, no drop path, fewer regions."""
    if 'num_classes' in node:
        node['num_classes'] = num_classes
    if 'drop_path_rate' in node:  # meant for runs a hundred times as long
        node['drop_path_rate'] = 0.0
    init = node.get('init_cfg')
    if init:
        init = init if isinstance(init, list) else [init]
        node['init_cfg'] = [one for one in init if one['type'] != 'Pretrained'] or None
    if 'pretrained' in node:
        node['pretrained'] = False if isinstance(node['pretrained'], bool) else None
    if node.get('type') == 'RandomSampler' and 'pos_fraction' in node:
        node['num'] = min(node['num'], MAX_ROIS)
    if 'hand_model' in node:
        node['hand_model'] = 'synthetic'
    if 'nms_pre' in node:
        node.update(nms_pre=min(node['nms_pre'], MAX_BOXES))
        node.update(max_per_img=min(node['max_per_img'], MAX_BOXES))


def shrink_sizes(node, factor):
    keys = ['scale', 'crop_size', 'size']
    if node.get('mode') == 'slide':
        keys.append('stride')
    for key in keys:
        if key in node:
            node[key] = scaled(node[key], factor)


def scaled(size, factor):
    if isinstance(size, (list, tuple)):
        return type(size)(scaled(one, factor) for one in size)
    return round(size * factor) if isinstance(size, (int, float)) else size


def soften_augmentation(node):
    """The same augmentations, milder: at full strength they need the config's long schedule."""
    kind = node.get('type')
    if kind in ('RandomResizedCrop', 'FastRandomResizedCrop'):
        node['crop_ratio_range'] = (0.5, 1.0)  # a crop of 8 % shows too little of a shape
    elif kind == 'RandomResize':
        node['ratio_range'] = (0.9, 1.1)  # at half its size, a shape is only a few pixels
    elif kind == 'PhotoMetricDistortion':
        mild = (0.8, 1.2)
        node.update(brightness_delta=16, contrast_range=mild, saturation_range=mild, hue_delta=9)
    elif kind == 'RandAugment':
        node.update(num_policies=1, magnitude_level=3)
    elif kind in ('RandomErasing', 'FastRandomErasing'):
        node['erase_prob'] = 0.1
    elif kind == 'RandomHandView':
        node.update(rotation=10, zoom=0.05, shift=0.02)
    elif kind == 'RandomChannelNoise':
        node['noise'] = 0.1
    elif kind in ('Mixup', 'CutMix'):
        node['alpha'] = 0.05  # most mixtures are then almost one of the two images


def use_data(cfg, demo, folder):
    """Point loaders and metrics at the demo data. Loading runs in the main process: for so little
    data, starting workers costs more than they save."""
    if demo['data'] == 'freihand':
        meta, layout = {}, {}
    elif demo['data'] == 'ade20k':
        folder /= 'ADEChallengeData2016'
        meta = dict(classes=SCENE_CLASSES, palette=list(PALETTE))
        # ADE20KDataset only accepts subsets of its 150 classes; its base class reads this layout.
        layout = dict(type='BaseSegDataset', reduce_zero_label=True)
        layout.update(img_suffix='.jpg', seg_map_suffix='.png')
    else:
        meta, layout = dict(classes=CLASSES, palette=list(PALETTE[1:])), {}
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            continue
        batch = demo['batch'] if split == 'train' else min(loader.get('batch_size', 1), 64)
        loader.update(batch_size=batch, num_workers=0, persistent_workers=False, pin_memory=False)
        loader.pop('prefetch_factor', None)
        for node in dicts(loader['dataset']):
            if 'data_root' in node:
                node.update(data_root=f'{folder}/', metainfo=dict(meta), **layout)
        for node in dicts(cfg.get(f'{split}_evaluator', {})):
            if 'ann_file' in node:
                node['ann_file'] = str(folder / 'annotations' / Path(node['ann_file']).name)


def warmup_and_cosine(warmup, total):
    return [
        ConfigDict(type='LinearLR', start_factor=0.01, begin=0, end=warmup),
        ConfigDict(type='CosineAnnealingLR', T_max=total - warmup, begin=warmup, end=total),
    ]


def retime(cfg, demo, images):
    """Shrink the schedule proportionally, in iterations, with one validation at the end."""
    loop, optimizer = cfg.train_cfg, cfg.optim_wrapper.optimizer
    by_epoch = 'max_epochs' in loop
    epoch = images / demo['batch']  # iterations
    epoch = floor(epoch) if cfg.train_dataloader.get('drop_last') else ceil(epoch)
    epochs = max(1, round(demo['iters'] / epoch))
    new_total = epochs * epoch if by_epoch else demo['iters']
    old_total = loop.max_epochs if by_epoch else loop.max_iters
    new_units = epochs if by_epoch else new_total
    loop.update({'max_epochs' if by_epoch else 'max_iters': new_units, 'val_interval': new_units})

    faster = demo['lr'] / optimizer.lr
    optimizer.lr = demo['lr']
    warmup = round(WARMUP * new_total)
    if demo.get('cosine'):
        cfg.param_scheduler = warmup_and_cosine(warmup, new_total)
        old_total = new_total
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    start = {one.end for one in schedulers if one.type == 'LinearLR' and one.begin == 0}

    def moved(time):
        return warmup if time in start else round(time * new_total / old_total)

    for one in schedulers:
        one.by_epoch = False
        one.pop('convert_to_iter_based', None)
        if 'T_max' in one:
            one.T_max = moved(one.begin + one.T_max) - moved(one.begin)
        for key in ('begin', 'end'):
            if key in one:
                one[key] = moved(one[key])
        if 'milestones' in one:
            one.milestones = [moved(time) for time in one.milestones]
        if 'eta_min' in one:
            one.eta_min *= faster

    wrapper = cfg.optim_wrapper
    if wrapper.get('type') == 'AmpOptimWrapper':  # no fp16 on CPUs
        wrapper.type = 'OptimWrapper'
        wrapper.pop('dtype', None)
        wrapper.pop('loss_scale', None)
    wrapper.pop('accumulative_counts', None)
    for hook in cfg.get('custom_hooks') or []:
        if hook.type == 'EMAHook':  # averages over a twentieth of the run
            hook.momentum = max(hook.get('momentum', 0), 20 / new_total)
    hooks = cfg.default_hooks
    hooks.checkpoint.interval = new_units
    hooks.logger.interval = max(1, new_total // 20)
    if 'auto_scale_lr' in cfg:  # the learning rate above is for this batch
        cfg.auto_scale_lr.base_batch_size = demo['batch']
    cfg.env_cfg.cudnn_benchmark = False  # its choice of algorithms depends on timing
