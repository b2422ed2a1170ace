"""The text of a config for a data set."""

from fastvit_mm.models.archs import ARCHS

from .found import Found
from .recipe import REGIONS, Machine, Recipe

LINE = 96


def write(task: str, found: Found, recipe: Recipe, machine: Machine, arch: str, weights) -> str:
    """A config for ``found``.

    Args:
        arch: a variant of FastViT.
        weights: a short name, file or URL, or None for a run from scratch.
    """
    base, own, body, loaders = BODIES[task](found, machine, arch)
    return '\n'.join(
        [
            *head(found, base),
            *own,
            *numbers(recipe, arch, weights),
            '',
            *body,
            '',
            *loaders,
            '',
            *schedule(recipe),
            '',
        ]
    )


def head(found: Found, base: str) -> list[str]:
    return [
        f'# {found.layout}: {len(found.splits["train"])} training images, {len(found.classes)} '
        'classes. Written by `fastvit init`; change what you like.',
        f"_base_ = 'fastvit_mm::{base}'",
        '',
        f'data_root = {str(found.root)!r}',
        'here = """{{ fileDirname }}"""  # the folder of this file',
        "work_dir = here + '/run'",
        f'classes = {tuple_of(found.classes)}',
    ]


def tuple_of(values: tuple) -> str:
    """Source of a tuple, in lines of limited length."""
    texts = [f'{one!r},' for one in values]
    lines = ['']
    for one in texts:
        if len(lines[-1]) + len(one) > LINE - 12:
            lines.append('')
        lines[-1] = f'{lines[-1]} {one}'.strip()
    if len(lines) > 1:
        return '(\n' + ''.join(f'    {one}\n' for one in lines) + ')'
    return f'({lines[0].rstrip(",") if len(values) > 1 else lines[0]})'


def numbers(recipe: Recipe, arch: str, weights) -> list[str]:
    why = recipe.reasons
    published = f"'fastvit_{arch}.apple_in1k': published, better with few images (a download)"
    return [
        f'weights = {weights!r}' + ('' if weights else f'  # {published}'),
        f'size = {recipe.size}  # {why["size"]}',
        f'batch = {recipe.batch}  # {why["batch"]}',
        f'epochs = {recipe.epochs}  # {why["epochs"]}',
        f'warmup = {recipe.warmup}  # epochs in which the learning rate rises: a twentieth',
        f'lr = {recipe.lr!r}  # {why["lr"]}',
        f'workers = {recipe.workers}  # processes that read images: {why["workers"]}',
    ]


def schedule(recipe: Recipe) -> list[str]:
    return [
        'optim_wrapper = dict(optimizer=dict(lr=lr))',
        'param_scheduler = [',
        "    dict(type='LinearLR', start_factor=0.01, end=warmup, convert_to_iter_based=True),",
        "    dict(type='CosineAnnealingLR', begin=warmup, end=epochs, eta_min_ratio=0.01,",
        '         convert_to_iter_based=True),',
        ']',
        'auto_scale_lr = dict(base_batch_size=batch)',
        f'train_cfg = dict(max_epochs=epochs, val_interval={recipe.every})',
        f'default_hooks = dict(checkpoint=dict(interval={recipe.every}), logger=dict(interval=10))',
    ]


PIPELINES = 'train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline'
PRETRAINED = "weights and dict(type='Pretrained', checkpoint=weights)"


def loaders(found: Found, files: dict[str, str]) -> list[str]:
    """The three loaders; ``files`` has what names the files of each split."""
    lines = ['loading = dict(num_workers=workers, persistent_workers=workers > 0)']
    for split in ('train', 'val', 'test'):
        if split == 'test' and 'test' not in found.splits:
            return [*lines, 'test_dataloader = val_dataloader']
        batch = 'batch_size=batch, ' if split == 'train' else ''
        pipeline = 'train_pipeline' if split == 'train' else 'test_pipeline'
        lines += [
            f'{split}_dataloader = dict({batch}**loading, dataset=dict(',
            f'    **own, {files[split]}, pipeline={pipeline}))',
        ]
    return lines


def lists(found: Found) -> dict[str, str]:
    return {one: f"ann_file=here + '/{one}.txt'" for one in found.splits}


def classification(found: Found, machine: Machine, arch: str) -> tuple:
    last = ARCHS[arch]['widths'][-1]
    body = [
        'model = dict(',
        f'    init_cfg={PRETRAINED},',
        f'    backbone=dict(arch={arch!r}), neck=dict(in_channels={last}),',
        f'    head=dict(in_channels={2 * last}, num_classes=len(classes)))',
        'data_preprocessor = dict(num_classes=len(classes))',
        PIPELINES,
        'train_pipeline[1].scale = test_pipeline[2].crop_size = size',
        'test_pipeline[1].scale = round(size / 0.9)  # of which the middle is used',
        'own = dict(data_root=data_root, metainfo=dict(classes=classes))',
    ]
    return 'classification/_base_/own_classes.py', [], body, loaders(found, lists(found))


def segmentation(found: Found, machine: Machine, arch: str) -> tuple:
    ids, unlabelled = found.details['ids'], found.details['unlabelled']
    own = [
        f'ids = {tuple_of(ids)}  # of the classes in the masks',
        f'unlabelled = {tuple_of(unlabelled)}  # ids that are not learned',
    ]
    body = [
        'model = dict(',
        f'    backbone=dict(arch={arch!r},',
        f'                  init_cfg={PRETRAINED}),',
        f'    neck=dict(in_channels={list(ARCHS[arch]["widths"])}),',
        '    decode_head=dict(num_classes=len(classes)),',
        '    data_preprocessor=dict(size=(size, size)))',
        PIPELINES,
        'train_pipeline[2].scale = test_pipeline[1].scale = (4 * size, size)  # long, short side',
        'train_pipeline[3].crop_size = (size, size)',
        'own = dict(data_root=data_root, metainfo=dict(classes=classes),',
        '           ids=ids, unlabelled=unlabelled)',
    ]
    return 'segmentation/_base_/own_masks.py', own, body, loaders(found, lists(found))


BOX_HEAD = ['    roi_head=dict(bbox_head=dict(num_classes=len(classes))))']
BOTH_HEADS = [
    '    roi_head=dict(bbox_head=dict(num_classes=len(classes)),',
    '                  mask_head=dict(num_classes=len(classes))))',
]


def detection(found: Found, machine: Machine, arch: str) -> tuple:
    outlines, anchor = found.details['outlines'], found.details['anchor']
    own = [f'anchor = {anchor}  # of a level of stride 4 to 64: fits the smaller objects']
    limits = []
    if not machine.gpu:
        own.append(f'regions = {REGIONS}  # learned from in an image; 512 with a GPU')
        limits = [
            '    train_cfg=dict(rpn_proposal=dict(max_per_img=4 * regions),',
            '                   rcnn=dict(sampler=dict(num=regions))),',
            '    test_cfg=dict(rpn=dict(max_per_img=4 * regions)),',
        ]
    body = [
        'model = dict(',
        f'    backbone=dict(arch={arch!r},',
        f'                  init_cfg={PRETRAINED}),',
        f'    neck=dict(in_channels={list(ARCHS[arch]["widths"])}),',
        '    rpn_head=dict(anchor_generator=dict(scales=[anchor])),',
        *limits,
        *(BOTH_HEADS if outlines else BOX_HEAD),
        PIPELINES,
        'train_pipeline[2].scale = test_pipeline[1].scale = (5 * size // 3, size)  # long, short',
        'own = dict(data_root=data_root, metainfo=dict(classes=classes))',
    ]
    names = annotations(found)
    files = {one: f'ann_file={file}, {folder}' for one, (file, folder) in names.items()}
    test = 'test' if 'test' in names else 'val'
    evaluators = [
        f'val_evaluator = dict(ann_file={evaluated(names["val"][0])})',
        f'test_evaluator = dict(ann_file={evaluated(names[test][0])})',
    ]
    base = f'detection/_base_/own_{"objects" if outlines else "boxes"}.py'
    return base, own, body, [*loaders(found, files), *evaluators]


def annotations(found: Found) -> dict[str, tuple[str, str]]:
    """The source of each split's file name, and the folder of its images."""
    if 'files' not in found.details:
        return {one: (f"here + '/{one}.json'", "data_prefix=dict(img='')") for one in found.splits}
    files, folders = found.details['files'], found.details['folders']
    prefixes = {one: folder.removeprefix('.') for one, folder in folders.items()}
    return {one: (repr(files[one]), f'data_prefix=dict(img={prefixes[one]!r})') for one in files}


def evaluated(file: str) -> str:
    """The metric has no data_root."""
    return file if file.startswith('here') else f'data_root + {"/" + file[1:-1]!r}'


BODIES = dict(classification=classification, segmentation=segmentation, detection=detection)
