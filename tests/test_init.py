"""`fastvit init`: what it recognizes, what it writes, and that its configs learn."""

import json
import math
import re
from pathlib import Path

import cv2
import foreign_layouts as foreign
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from fastvit_mm import FastViTError
from fastvit_mm.data import build_checked, guard
from fastvit_mm.demo.scenes import CLASSES, save
from fastvit_mm.init import Machine, init
from fastvit_mm.init.recipe import recipe
from fastvit_mm.init.tree import draw, size_of, split_of

CPU, GPU = Machine(False, 2), Machine(True, 16)
GREY = np.full((40, 60, 3), 90, np.uint8)


def written(tmp_path, task, **kwargs):
    """The config for tmp_path/data, and what was said."""
    kwargs = dict(machine=CPU) | kwargs
    lines = init(tmp_path / 'out', task, kwargs.pop('data', tmp_path / 'data'), **kwargs)
    return Config.fromfile(tmp_path / 'out' / 'config.py'), '\n'.join(lines)


def dataset(cfg, split):
    """Built as a run builds it, with the checks of a run."""
    if cfg.default_scope == 'mmdet':
        from fastvit_mm.data import coco  # noqa: F401
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        built = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        guard(built)
        return built


def refused(tmp_path, task, match, **kwargs):
    with pytest.raises(FastViTError, match=match) as error:
        written(tmp_path, task, **kwargs)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists() or kwargs.get('overwrite')


def draw_data(task, folder, number):
    write = dict(
        classification=foreign.class_folders,
        detection=foreign.coco,
        segmentation=foreign.images_and_masks,
    )[task]
    write(folder, number)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob('*') if p.is_file()}


# ----------------------------------------------------------------------------------- class folders


@pytest.mark.parametrize('split', [False, True])
def test_class_folders(tmp_path, split):
    """Every image gets the label of its folder's name, also where a split lacks a class."""
    where = '{name}/{index:04d} a.jpg'
    if split:
        foreign.class_folders(tmp_path / 'data/archive', 12, f'training/{where}')
        foreign.class_folders(tmp_path / 'data/archive', 4, f'valid/{where}', seed=1)
        foreign.class_folders(tmp_path / 'data/archive', 5, f'test/{where}', seed=2)
    else:
        foreign.class_folders(tmp_path / 'data', 20, where)
    before = snapshot(tmp_path / 'data')
    cfg, said = written(tmp_path, 'classification')
    assert cfg.classes == CLASSES and cfg.model.head.num_classes == len(CLASSES)
    seen = []
    for one in ('train', 'val', 'test'):
        built = dataset(cfg, one)
        assert built.metainfo['classes'] == CLASSES
        for i in range(len(built)):
            info = built.get_data_info(i)
            path = Path(info['img_path'])
            assert CLASSES[info['gt_label']] == path.parent.name
            seen.append((one, path))
        built[0]
    number = {one: sum(s == one for s, _ in seen) for one in ('train', 'val', 'test')}
    if split:
        assert number == dict(train=12, val=4, test=5)
        assert {
            (s, {'training': 'train', 'valid': 'val'}.get(p.parts[-3], 'test')) for s, p in seen
        }
        assert 'no images of triangle in val' in said  # four scenes are of the first four classes
    else:
        assert number == dict(train=15, val=5, test=5)  # one of each class
        assert not {p for s, p in seen if s == 'train'} & {p for s, p in seen if s == 'val'}
    assert snapshot(tmp_path / 'data') == before


def test_the_split_is_drawn_with_the_seed(tmp_path):
    foreign.class_folders(tmp_path / 'data', 20)
    lists = []
    for seed in (0, 0, 1):
        init(tmp_path / 'out', 'classification', tmp_path / 'data', seed=seed, overwrite=True)
        lists.append((tmp_path / 'out/val.txt').read_text())
    assert lists[0] == lists[1] != lists[2]


def test_what_is_drawn():
    groups = [0] * 10 + [1] * 3 + [2]
    train, val = draw(list(range(14)), 0.2, 0, groups)
    assert sorted(train + val) == list(range(14))
    assert [sum(groups[i] == g for i in val) for g in range(3)] == [2, 1, 0]
    with pytest.raises(FastViTError, match='too few'):
        draw([1], 0.2, 0)


@pytest.mark.parametrize(
    'path, split',
    [
        ('valid/a', 'val'),
        ('Train-images', 'train'),
        ('testing', 'test'),
        ('trainers/a', None),
        ('value/a', None),
    ],
)
def test_names_of_splits(path, split):
    assert split_of(path) == split


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    'where',
    [
        ('images', 'masks'),
        ('train', 'trainannot'),
        ('JPEGImages', 'SegmentationClass'),
        ('img/a', 'labels/a'),
        ('.', '.'),
    ],
)
def test_masks_find_their_images(tmp_path, where):
    foreign.images_and_masks(tmp_path / 'data', 6, where=where)
    cfg, _ = written(tmp_path, 'segmentation')
    for split, number in (('train', 5), ('val', 1)):
        built = dataset(cfg, split)
        assert len(built) == number
        for i in range(number):
            info = built.get_data_info(i)
            assert Path(info['img_path']).stem == Path(info['seg_map_path']).stem
            assert info['img_path'].endswith('.jpg') and info['seg_map_path'].endswith('.png')


def test_masks_with_endings(tmp_path):
    """Same folder, `a_mask.png` beside `a.png`."""
    for name in 'abc':
        save(tmp_path / f'data/{name}.png', GREY)
        save(tmp_path / f'data/{name}_mask.png', np.eye(40, 60, dtype=np.uint8))
    cfg, _ = written(tmp_path, 'segmentation')
    pairs = [line.split('\t') for line in (tmp_path / 'out/train.txt').read_text().splitlines()]
    assert all(mask == image.replace('.png', '_mask.png') for image, mask in pairs)
    assert cfg.classes == ('background', 'object')


def labels_in(tmp_path, cfg):
    """The labels that a run sees, against the file, for the first training image."""
    built = dataset(cfg, 'train')
    sample = built.get_data_info(0)
    file = np.asarray(Image.open(sample['seg_map_path']))
    built.pipeline.transforms = built.pipeline.transforms[:4]  # loading, and the checks of a run
    return built[0]['gt_seg_map'], file


def test_ids_with_gaps_and_names(tmp_path):
    """Labels count the ids; the names are those of the ids, in whatever order the file has them."""
    ids = (40, 7, 33, 12, 2)
    foreign.images_and_masks(tmp_path / 'data', 10, ids, nothing=255)
    rows = [f'{i}: {name}' for i, name in sorted(zip(ids, CLASSES, strict=True), reverse=True)]
    (tmp_path / 'data/classes.txt').write_text('\n'.join([*rows, '50: never seen', '']))
    cfg, said = written(tmp_path, 'segmentation')
    assert cfg.ids == (2, 7, 12, 33, 40, 50) and cfg.unlabelled == (255,)
    assert cfg.classes == ('triangle', 'cross', 'star', 'moon', 'circle', 'never seen')
    assert cfg.model.decode_head.num_classes == 6
    got, file = labels_in(tmp_path, cfg)
    assert set(np.unique(got)) - {255} and set(np.unique(got)) <= {0, 1, 2, 3, 4, 255}
    for label, one in enumerate(cfg.ids):
        assert ((got == label) == (file == one)).all()
    assert ((got == 255) == (file == 255)).all()
    assert 'classes.txt' in said


def test_names_that_begin_with_1(tmp_path):
    """As in ADE20K: a name for each id but 0, which is then unlabelled."""
    foreign.images_and_masks(tmp_path / 'data', 10)
    (tmp_path / 'data/labels.txt').write_text('\n'.join(CLASSES))
    cfg, _ = written(tmp_path, 'segmentation')
    assert (cfg.classes, cfg.ids, cfg.unlabelled) == (CLASSES, (1, 2, 3, 4, 5), (0,))


@pytest.mark.parametrize('given, unlabelled', [(None, ()), ('0', (0,)), ('none', ())])
def test_the_user_says_what_is_unlabelled(tmp_path, given, unlabelled):
    foreign.images_and_masks(tmp_path / 'data', 10)
    cfg, said = written(tmp_path, 'segmentation', unlabelled=given)
    assert cfg.unlabelled == unlabelled and len(cfg.classes) == 6 - len(unlabelled)
    assert ('--unlabelled ID' in said) == (not unlabelled)


def test_black_and_white_masks(tmp_path):
    """255 is mmseg's label for unlabelled pixels; here it is the object."""
    foreign.images_and_masks(tmp_path / 'data', 10, (255,) * 5)
    cfg, _ = written(tmp_path, 'segmentation')
    assert (cfg.ids, cfg.classes) == ((0, 255), ('background', 'object'))
    got, file = labels_in(tmp_path, cfg)
    assert (got == (file == 255)).all()


def test_coloured_masks(tmp_path):
    """Kaggle's CamVid: colours, and their names in a table."""
    colours = [(0, 0, 0), (128, 0, 0), (128, 0, 1), (9, 9, 9), (0, 255, 0), (255, 255, 255)]
    names = ['sky', 'car', 'road', 'tree', 'wall', 'Void']
    for index, scene in enumerate(foreign.scenes(10)):
        mask = foreign.mask_of(scene, (1, 2, 3, 4, 5))
        save(tmp_path / f'data/images/{index}.jpg', scene.image)
        save(tmp_path / f'data/labels/{index}.png', np.array(colours, np.uint8)[mask])
    rows = [f'{n}, {r}, {g}, {b}' for n, (r, g, b) in zip(names, colours, strict=True)]
    (tmp_path / 'data/class_dict.csv').write_text('\n'.join(['name, r, g, b', *rows]))
    cfg, _ = written(tmp_path, 'segmentation')
    assert cfg.unlabelled == ('#ffffff',)
    by_name = dict(zip(cfg.classes, cfg.ids, strict=True))
    assert by_name['road'] == '#800001' and by_name['sky'] == '#000000'
    got, file = labels_in(tmp_path, cfg)
    for label, one in enumerate(cfg.ids):
        colour = [int(one[i : i + 2], 16) for i in (1, 3, 5)]
        assert ((got == label) == (file == colour).all(-1)).all()


def test_an_id_that_init_has_not_seen_stops_a_run(tmp_path):
    foreign.images_and_masks(tmp_path / 'data', 10)
    cfg, _ = written(tmp_path, 'segmentation')
    for path in (tmp_path / 'data/masks').iterdir():
        save(path, np.full(np.asarray(Image.open(path)).shape, 6, np.uint8))
    with pytest.raises(FastViTError, match='has the class id 6, which is not in the config'):
        dataset(cfg, 'train')[0]


def test_masks_of_no_use(tmp_path):
    foreign.images_and_masks(tmp_path / 'data', 4, (0,) * 5)
    refused(tmp_path, 'segmentation', 'have 1 class')
    for path in sorted((tmp_path / 'data/masks').iterdir()):
        height, width = cv2.imread(str(path)).shape[:2]
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        save(path.with_suffix('.jpg'), noise)
        path.unlink()
    refused(tmp_path, 'segmentation', 'JPEG blurs them')
    for path in (tmp_path / 'data/masks').iterdir():
        path.unlink()
    refused(tmp_path, 'segmentation', '0 masks for 4 images')


# ------------------------------------------------------------------------------------------- boxes


def truth(number, layout, **kwargs):
    """By image: class name and box (left, top, right, bottom) of each object.

    Pascal VOC's are those of the whole pixels that an object touches.
    """
    found = {}
    for index, scene in enumerate(foreign.scenes(number, **kwargs)):
        lines = [(CLASSES[one.label], foreign.outline(one)) for one in scene.instances]
        low, high = (np.floor, np.ceil) if layout == 'voc' else (np.array, np.array)
        boxes = [(name, [*low(line.min(0)), *high(line.max(0))]) for name, line in lines]
        found[f'{index:04d}.jpg'] = boxes
    return found


def seen_by_a_run(cfg, split):
    """By image: (class name, box) as the data set gives them, and its outlines."""
    found, built = {}, dataset(cfg, split)
    names = built.metainfo['classes']
    for i in range(len(built)):
        info = built.get_data_info(i)
        objects = []
        for one in info['instances']:
            objects.append((names[one['bbox_label']], one['bbox'], one.get('mask')))
        found[Path(info['img_path']).name] = objects
        assert built[i] is not None  # the pipeline of the config
    return found


LAYOUTS = {
    'coco': (foreign.coco, {}, 1e-6),
    'yolo': (foreign.yolo, {}, 1e-3),
    'yolo outlines': (foreign.yolo, dict(outlines=True), 1e-3),
    'voc': (foreign.voc, {}, 1e-6),
    'labelme': (foreign.labelme, {}, 1e-6),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_objects(tmp_path, name):
    """Names and boxes are those of the scenes, in any layout. COCO's ids are in another order than
    the file lists them, and have gaps."""
    write, options, tolerance = LAYOUTS[name]
    write(tmp_path / 'data', 10, **options)
    before = snapshot(tmp_path / 'data')
    cfg, _ = written(tmp_path, 'detection')
    assert sorted(cfg.classes) == sorted(CLASSES)
    expected, found = truth(10, name), {}
    for split in ('train', 'val'):
        found |= seen_by_a_run(cfg, split)
    assert found.keys() == expected.keys()
    outlines = 0
    for image, objects in expected.items():
        assert len(found[image]) == len(objects)
        for (kind, box), (other, seen, mask) in zip(objects, found[image], strict=True):
            assert kind == other
            assert np.abs(np.array(box) - seen).max() < tolerance
            outlines += mask is not None
    masks = 'mask' in cfg.model.type.lower()
    assert masks == bool(outlines) == (name in ('coco', 'yolo outlines', 'labelme'))
    assert bool(cfg.model.roi_head.mask_head) == masks
    assert snapshot(tmp_path / 'data') == before


@pytest.mark.parametrize('name', ['yolo outlines', 'labelme'])
def test_outlines_cover_the_objects(tmp_path, name):
    """Drawn by pycocotools, they are the masks of the scenes; so is the area."""
    write, options, _ = LAYOUTS[name]
    write(tmp_path / 'data', 5, **options)
    written(tmp_path, 'detection')
    for split in ('train', 'val'):
        api = COCO(tmp_path / f'out/{split}.json')
        for one in api.imgs.values():
            scene = list(foreign.scenes(5))[int(Path(one['file_name']).stem)]
            objects = api.loadAnns(api.getAnnIds(one['id']))
            for obj, instance in zip(objects, scene.instances, strict=True):
                drawn = api.annToMask(obj).astype(bool)
                real = instance.mask[2::4, 2::4]
                assert (drawn & real).sum() / (drawn | real).sum() > 0.9
                assert math.isclose(obj['area'], real.sum(), rel_tol=0.1)
                assert rle.area(rle.encode(np.asfortranarray(drawn))) > 0


def test_class_names_of_coco_have_the_order_of_the_ids(tmp_path):
    foreign.coco(tmp_path / 'data', 10, ids=(90, 1, 50, 2, 7))
    cfg, _ = written(tmp_path, 'detection')
    assert cfg.classes == ('cross', 'star', 'triangle', 'moon', 'circle')


def test_coco_files_for_each_split_are_used_as_they_are(tmp_path):
    for split, number in (('train', 6), ('valid', 3), ('test', 2)):
        file, folder = f'{split}/_annotations.coco.json', split
        foreign.coco(tmp_path / 'data', number, file=file, folder=folder)
    cfg, said = written(tmp_path, 'detection')
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['config.py']
    assert [len(dataset(cfg, s)) for s in ('train', 'val', 'test')] == [6, 3, 2]
    assert cfg.test_evaluator.ann_file == str(tmp_path / 'data/test/_annotations.coco.json')
    assert '6 train, 3 val, 2 test (as the folders say)' in said


def test_a_heading_of_categories_is_no_class(tmp_path):
    """Roboflow writes a category 0 of which the others are kinds."""
    foreign.coco(tmp_path / 'data', 10)
    path = tmp_path / 'data/labels.json'
    content = json.loads(path.read_text())
    for one in content['categories']:
        one['supercategory'] = 'shapes'
    content['categories'].insert(0, dict(id=0, name='shapes', supercategory='none'))
    path.write_text(json.dumps(content))
    cfg, _ = written(tmp_path, 'detection')
    assert 'shapes' not in cfg.classes and len(cfg.classes) == 5


def test_coco_files_that_disagree(tmp_path):
    for split, ids in (('train', (1, 2, 3, 4, 5)), ('val', (2, 1, 3, 4, 5))):
        foreign.coco(tmp_path / 'data', 4, ids, file=f'{split}.json', folder=split)
    refused(tmp_path, 'detection', "val.json calls the category 1 'cross', another file 'circle'")


def upright(tmp_path, orientation=6):
    """Photos that a camera has stored lying."""
    for path in sorted((tmp_path / 'data').rglob('*.jpg')):
        with Image.open(path) as image:
            lying = image.rotate(90, expand=True)
            exif = Image.Exif()
            exif[0x0112] = orientation
            lying.save(path, exif=exif, quality=95)


@pytest.mark.parametrize('name', ['yolo', 'labelme', 'voc'])
def test_photos_that_are_turned(tmp_path, name):
    """Boxes are those of the upright photo, which is what a run reads."""
    write, options, tolerance = LAYOUTS[name]
    write(tmp_path / 'data', 10, **options)
    upright(tmp_path)
    cfg, _ = written(tmp_path, 'detection')
    expected, found = truth(10, name), seen_by_a_run(cfg, 'train')
    for image, objects in found.items():
        for (kind, box), (other, seen, _) in zip(expected[image], objects, strict=True):
            assert kind == other and np.abs(np.array(box) - seen).max() < tolerance


def test_sizes_of_turned_photos(tmp_path):
    Image.new('RGB', (60, 40)).save(tmp_path / 'a.jpg')
    assert size_of(tmp_path / 'a.jpg') == (60, 40)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new('RGB', (60, 40)).save(tmp_path / 'b.jpg', exif=exif)
    assert size_of(tmp_path / 'b.jpg') == (40, 60)


def test_annotations_for_another_size(tmp_path):
    foreign.voc(tmp_path / 'data', 4)
    path = tmp_path / 'data/Annotations/0001.xml'
    path.write_text(path.read_text().replace('<width>80', '<width>800'))
    refused(tmp_path, 'detection', r'0001.jpg has 80 x 64 pixels, but .*0001.xml is for 800 x 64')


def test_yolo_with_splits_and_images_without_objects(tmp_path):
    for split, number in (('train', 5), ('val', 3)):
        foreign.yolo(tmp_path / split, number)
        for kind in ('images', 'labels'):
            (tmp_path / f'data/{kind}').mkdir(parents=True, exist_ok=True)
            (tmp_path / split / kind).rename(tmp_path / f'data/{kind}/{split}')
    (tmp_path / 'data/labels/train/0002.txt').unlink()
    (tmp_path / 'data/x.yaml').write_text(
        'path: ../elsewhere\ntrain: images/train\nval: images/val\n'
        'names: {0: circle, 1: cross, 2: moon, 3: star, 9: nothing, 4: triangle}\n'
    )
    cfg, said = written(tmp_path, 'detection', data=tmp_path / 'data/x.yaml')
    assert cfg.classes == (*CLASSES, 'nothing')
    assert '5 train, 3 val' in said and '1 of 5 training images have no objects' in said
    assert [len(dataset(cfg, s)) for s in ('train', 'val')] == [4, 3]


@pytest.mark.parametrize(
    'row, wrong',
    [
        ('7 0.5 0.5 0.1 0.1', 'line 2: class 7 is not in the yaml'),
        ('1 0.5 0.5 0.1', 'line 2: .* is neither a box nor an outline'),
        ('1 32 32 10 10', 'line 2: .* no fractions of the image'),
        ('1 a b c d', 'line 2: could not convert'),
    ],
)
def test_broken_lines_of_yolo(tmp_path, row, wrong):
    foreign.yolo(tmp_path / 'data', 4)
    (tmp_path / 'data/labels/0003.txt').write_text(f'0 0.5 0.5 0.2 0.2\n{row}\n')
    refused(tmp_path, 'detection', f'0003.txt, {wrong}')


def test_shapes_of_labelme(tmp_path):
    """Rectangles, circles and groups; points and lines enclose nothing."""
    save(tmp_path / 'data/a.png', GREY)
    save(tmp_path / 'data/b.png', GREY)
    shapes = [
        ('box', 'rectangle', [[30, 20], [10, 5]], None),
        ('disc', 'circle', [[30, 20], [33, 24]], None),
        ('cat', 'polygon', [[0, 0], [4, 0], [4, 4], [0, 4]], 3),
        ('cat', 'polygon', [[10, 0], [14, 0], [14, 4], [10, 4]], 3),
        ('cat', 'point', [[5, 5]], None),
    ]
    entries = [dict(label=a, shape_type=b, points=c, group_id=d) for a, b, c, d in shapes]
    for name in 'ab':
        content = dict(shapes=entries, imagePath=f'..\\old\\{name}.png', imageWidth=60)
        (tmp_path / f'data/{name}.json').write_text(json.dumps(content | dict(imageHeight=40)))
    cfg, said = written(tmp_path, 'detection')
    (objects,) = seen_by_a_run(cfg, 'val').values()
    found = {name: np.round(box).tolist() for name, box, _ in objects}
    assert found == dict(box=[10, 5, 30, 20], disc=[25, 15, 35, 25], cat=[0, 0, 14, 4])
    areas = {a['area'] for a in json.loads((tmp_path / 'out/val.json').read_text())['annotations']}
    assert 32 in areas and any(abs(a - 25 * math.pi) < 1 for a in areas)
    assert '2 points, lines' in said and 'only' in said


def test_difficult_objects_of_voc(tmp_path):
    foreign.voc(tmp_path / 'data', 10)
    for path in (tmp_path / 'data/Annotations').iterdir():
        path.write_text(path.read_text().replace('<difficult>0', '<difficult>1', 1))
    cfg, said = written(tmp_path, 'detection')
    built = dataset(cfg, 'train')
    flags = [[o['ignore_flag'] for o in built.get_data_info(i)['instances']] for i in range(4)]
    assert all(one[0] == 1 and not any(one[1:]) for one in flags)
    assert '10 objects are marked difficult' in said


def test_lists_of_voc(tmp_path):
    foreign.voc(tmp_path / 'data', 10)
    for split, names in (('train', range(6)), ('val', (7, 8))):
        path = tmp_path / f'data/ImageSets/Main/{split}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(f'{i:04d}' for i in names))
    _, said = written(tmp_path, 'detection')
    assert '6 train, 2 val (as the folders say; 2 images beside them are not used' in said


# -------------------------------------------------------------------------------- what is refused


def test_several_layouts(tmp_path):
    foreign.yolo(tmp_path / 'data', 5)
    foreign.coco(tmp_path / 'data', 5, folder='images')
    refused(tmp_path, 'detection', r'has coco \(1 json file\) and yolo .*: say which with --layout')
    refused(tmp_path, 'detection', '--layout voc: .* layouts found: coco', layout='voc')
    assert sorted(written(tmp_path, 'detection', layout='coco')[0].classes) == sorted(CLASSES)
    (tmp_path / 'out/config.py').unlink()
    (tmp_path / 'out/train.json').unlink()
    (tmp_path / 'out/val.json').unlink()
    cfg, _ = written(tmp_path, 'detection', data=tmp_path / 'data/labels.json')
    assert cfg.classes[0] == 'cross'


@pytest.mark.parametrize('task', ['classification', 'detection', 'segmentation'])
def test_folders_with_nothing_to_learn(tmp_path, task):
    refused(tmp_path, task, 'data does not exist')
    (tmp_path / 'data').mkdir()
    refused(tmp_path, task, 'is an empty folder')
    (tmp_path / 'data/notes.txt').write_text('one')
    refused(tmp_path, task, 'data holds 1 .txt in 1 folder')
    save(tmp_path / 'data/a.jpg', GREY)
    refused(tmp_path, task, 'data holds 1 .(txt|jpg), 1 .(txt|jpg) in 1 folder')


def test_the_wrong_task(tmp_path):
    foreign.images_and_masks(tmp_path / 'data', 4)
    refused(tmp_path, 'classification', 'use --task segmentation')
    refused(tmp_path, 'detection', 'but no boxes')


def test_a_damaged_image(tmp_path):
    foreign.yolo(tmp_path / 'data', 4)
    (tmp_path / 'data/images/0002.jpg').write_bytes(b'no image')
    refused(tmp_path, 'detection', '0002.jpg is no image')


def test_what_is_there_stays(tmp_path):
    foreign.class_folders(tmp_path / 'data', 10)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/notes.txt').write_text('mine')
    with pytest.raises(FastViTError, match='has files: give another folder, or --overwrite'):
        written(tmp_path, 'classification')
    for folder in (tmp_path / 'data', tmp_path):
        with pytest.raises(FastViTError, match='holds the data'):
            init(folder, 'classification', tmp_path / 'data', overwrite=True)
    written(tmp_path, 'classification', overwrite=True)
    assert (tmp_path / 'out/notes.txt').read_text() == 'mine'


def test_a_folder_within_the_data(tmp_path):
    """What an earlier call has written there is no data."""
    foreign.coco(tmp_path / 'data', 10)
    for _ in range(2):
        lines = init(tmp_path / 'data/x', 'detection', tmp_path / 'data', overwrite=True)
        assert '8 train, 2 val (0.2 drawn' in lines[0]


@pytest.mark.parametrize(
    'options, wrong',
    [
        (dict(val=1.0), '--val 1'),
        (dict(arch='t9'), '--arch t9: one of t8'),
        (dict(pretrained='fastvit_sa12.apple_in1k'), 'is for sa12: add --arch sa12'),
        (dict(unlabelled='9'), '--unlabelled 9 is no id of the masks; they have 0, 1'),
        (dict(names='none.txt'), 'none.txt cannot be read for names'),
    ],
)
def test_options(tmp_path, options, wrong):
    foreign.images_and_masks(tmp_path / 'data', 5)
    refused(tmp_path, 'segmentation', wrong, **options)


# ---------------------------------------------------------------------------- numbers and configs


@pytest.mark.parametrize('task', ['classification', 'detection', 'segmentation'])
def test_batches_larger_than_the_data(tmp_path, task):
    """A line that says which number to lower; nothing of the sort with the config as written."""
    draw_data(task, tmp_path / 'data', 10)
    cfg, _ = written(tmp_path, task)
    loader = cfg.train_dataloader
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        assert len(build_checked(loader)) >= 1
        loader.batch_size = 500
        if task == 'detection':  # its batches may be incomplete
            assert len(build_checked(loader)) <= 2
            return
        with pytest.raises(FastViTError, match='images, fewer than a batch of 500'):
            build_checked(loader)
        loader.drop_last = False
        assert len(build_checked(loader)) == 1


def test_numbers_fit_images_and_machine():
    for task in ('classification', 'detection', 'segmentation'):
        few, many = (recipe(task, n, (640, 480), False, GPU) for n in (10, 100_000))
        assert few.batch <= 10 and few.epochs > many.epochs and few.batch < many.batch
        small, large = (recipe(task, 100, (640, 480), False, m) for m in (CPU, GPU))
        assert small.size < large.size and small.workers == 0 < large.workers
        assert recipe(task, 100, (70, 90), False, GPU).size == 96
        assert recipe(task, 100, (640, 480), True, GPU).lr < large.lr
        for n in range(1, 40):
            one = recipe(task, n, (64, 64), False, CPU)
            assert 1 <= one.batch <= n and one.warmup < one.epochs and one.every <= one.epochs


def test_averaged_weights_leave_the_start(tmp_path):
    """After 32 iterations, as many as 30 epochs of few images may have."""
    foreign.class_folders(tmp_path / 'data', 10)
    cfg, _ = written(tmp_path, 'classification')
    import torch
    from mmengine.registry import MODELS

    hook = next(dict(h) for h in cfg.custom_hooks if h['type'] == 'EMAHook')
    for key in ('type', 'priority'):
        hook.pop(key)
    model = torch.nn.Linear(1, 1)
    average = MODELS.build(hook | dict(type=hook.pop('ema_type')), default_args=dict(model=model))
    torch.nn.init.zeros_(model.weight)
    for step in range(32):
        model.weight.data.fill_(float(step))
        average.update_parameters(model)
    assert average.module.weight.item() > 20


@pytest.mark.parametrize('task', ['classification', 'detection', 'segmentation'])
def test_configs_are_short_and_explained(tmp_path, task):
    draw_data(task, tmp_path / 'data', 10)
    cfg, said = written(tmp_path, task, pretrained='fastvit_sa12.apple_in1k', arch='sa12')
    text = (tmp_path / 'out/config.py').read_text()
    lines = text.splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 100
    for name in ('size', 'batch', 'epochs', 'warmup', 'lr', 'workers'):
        assert len(re.findall(rf'^{name} = .+  # .+', text, re.M)) == 1, name
    assert text.count(str(tmp_path / 'data')) == 1
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size == cfg.batch
    part = cfg.model if task == 'classification' else cfg.model.backbone
    assert part.init_cfg.checkpoint == 'fastvit_sa12.apple_in1k'
    assert cfg.model.backbone.arch == 'sa12' and str(tmp_path / 'out/config.py') in said
    assert 'next: fastvit train' in said


def test_many_classes_with_spaces(tmp_path):
    names = [f"kind {i} of someone's" for i in range(40)]
    for name in names:
        for i in range(2):
            save(tmp_path / f'data/{name}/{i}.jpg', GREY)
    cfg, _ = written(tmp_path, 'classification')
    assert cfg.classes == tuple(sorted(names))
    assert len(dataset(cfg, 'train')) == 40
