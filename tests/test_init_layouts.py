"""`fastvit init` and data as people have them: what is read rightly, or refused in one line."""

import base64
import io
import json
import os
from pathlib import Path

import mmcv
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from pycocotools.coco import COCO

from fastvit_mm import FastViTError
from fastvit_mm.data import mask_pairs
from fastvit_mm.demo.scenes import save
from fastvit_mm.init import Machine, init
from fastvit_mm.init.coco import split_of_file
from fastvit_mm.init.names import parse
from fastvit_mm.init.tree import Tree, size_of, split_of

GREY = np.full((40, 60, 3), 90, np.uint8)
BANDS = np.arange(40)[:, None].repeat(60, 1)  # row numbers


def run(tmp_path, task, data='data', **kwargs):
    """What was said."""
    lines = init(tmp_path / 'out', task, tmp_path / data, machine=Machine(False, 2), **kwargs)
    return '\n'.join(lines)


def refused(tmp_path, task, match, **kwargs):
    with pytest.raises(FastViTError, match=match) as error:
        run(tmp_path, task, **kwargs)
    assert '\n' not in str(error.value)


def values(tmp_path):
    """The variables of the config, without what it inherits."""
    text = (tmp_path / 'out/config.py').read_text().split('\nmodel =')[0]
    names = dict(_base_=None)
    exec(text.replace('{{ fileDirname }}', str(tmp_path / 'out')), names)
    return names


def listed(tmp_path, split):
    """The first paths of the lines of a split."""
    lines = (tmp_path / f'out/{split}.txt').read_text().splitlines()
    return [line.split('\t')[0].rsplit(' ', 1)[0] for line in lines]


def objects(tmp_path, split):
    """The content of a split, as pycocotools reads it."""
    return COCO(tmp_path / f'out/{split}.json')


def files_in(tmp_path, split):
    return sorted(one['file_name'] for one in objects(tmp_path, split).imgs.values())


def images(tmp_path, *names):
    for name in names:
        save(tmp_path / 'data' / name, GREY)


def write(tmp_path, name, text):
    path = tmp_path / 'data' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def pairs(tmp_path, ids=(0, 1, 2), number=6, images_in='images', masks_in='masks'):
    for i in range(number):
        images(tmp_path, f'{images_in}/{i}.jpg')
        mask = np.array(ids, np.uint8)[BANDS % len(ids)]
        save(tmp_path / f'data/{masks_in}/{i}.png', mask)


# -------------------------------------------------------------------------------- names of classes


@pytest.mark.parametrize(
    'text',
    [
        'class_id,name\n7,car\n2,road\n0,sky\n',
        'name,label\ncar,7\nroad,2\nsky,0\n',
        'class_name,label_id\ncar,7\nroad,2\nsky,0\n',
        'whatever,else\ncar,7\nroad,2\nsky,0\n',
        '7,car\n2,road\n0,sky\n',
        'id,name,category,instances\n7,car,vehicle,1\n2,road,ground,0\n0,sky,sky,0\n',
    ],
)
def test_tables_of_names(tmp_path, text):
    """No id is ever the number of the row."""
    write(tmp_path, 'classes.csv', text)
    if 'category' in text:  # two columns could be the names
        with pytest.raises(FastViTError, match='which column has the names'):
            parse(tmp_path / 'data/classes.csv')
    else:
        assert parse(tmp_path / 'data/classes.csv') == {0: 'sky', 2: 'road', 7: 'car'}


def test_a_table_of_one_column(tmp_path):
    write(tmp_path, 'classes.csv', 'category\nsky\nroad\n')
    assert parse(tmp_path / 'data/classes.csv') == ['sky', 'road']
    write(tmp_path, 'classes.csv', 'sky\nroad\n')
    with pytest.raises(FastViTError, match=r"its first line should be .name., not 'sky'"):
        parse(tmp_path / 'data/classes.csv')


@pytest.mark.parametrize(
    'name, text',
    [
        ('train_labels.csv', 'image,label\n' + ''.join(f'{i}.jpg,{i % 3}\n' for i in range(12))),
        ('image_labels.txt', ''.join(f'{i}.jpg {i % 3}\n' for i in range(12))),
        ('labels.txt', 'a\nb\na\n'),
        ('labels.csv', 'id,label\n' + ''.join(f'{i},kind {i}\n' for i in range(300))),
        ('labels.csv', 'image_id,label\n0,a\n0,b\n1,c\n'),
        ('classes.json', '["sky", 3, "car"]'),
    ],
)
def test_lists_that_name_no_classes(tmp_path, name, text):
    """They are left alone, and named."""
    pairs(tmp_path)
    write(tmp_path, name, text)
    said = run(tmp_path, 'segmentation')
    assert values(tmp_path)['classes'] == ('background', 'class_1', 'class_2')
    assert f'note: no names from {name}: ' in said


def test_more_classes_than_labels():
    ids = tuple(range(256))
    with pytest.raises(FastViTError, match='256 classes, but labels are 0 to 254'):
        mask_pairs.MaskPairs(ids, metainfo=dict(classes=tuple(map(str, ids))))


def test_a_list_whose_last_names_do_not_occur(tmp_path):
    """It may count from 1: what each id is called is printed."""
    pairs(tmp_path, ids=(0, 1, 2))
    write(tmp_path, 'classes.txt', 'wall\nfloor\ntree\nsky\n')
    said = run(tmp_path, 'segmentation')
    assert 'ids: 0 = wall, 1 = floor, 2 = tree, 3 = sky; names from classes.txt' in said
    assert 'has 4 names, the largest id is 2: counted from 0; if it counts from 1, write "1' in said


def test_names_of_ids_without_a_file(tmp_path):
    pairs(tmp_path, ids=(1, 2))
    run(tmp_path, 'segmentation')
    assert values(tmp_path)['classes'] == ('class_1', 'class_2')


@pytest.mark.parametrize('name', ['__ignore__', 'no_label', 'un_labelled'])
def test_names_of_what_is_unlabelled(tmp_path, name):
    pairs(tmp_path)
    write(tmp_path, 'classes.txt', f'0: {name}\n1: cat\n2: dog\n')
    run(tmp_path, 'segmentation')
    assert values(tmp_path)['unlabelled'] == (0,) and values(tmp_path)['classes'] == ('cat', 'dog')


# ------------------------------------------------------------------------------------------- masks


def test_palettes_that_differ(tmp_path):
    """The same colour is the same class, whatever its place in a palette."""
    red, green = (255, 0, 0), (0, 255, 0)
    for i in range(6):
        images(tmp_path, f'images/{i}.jpg')
        mask = Image.fromarray((BANDS % 3).astype(np.uint8))
        first, second = (red, green) if i % 2 else (green, red)
        mask.putpalette([0, 0, 0, *first, *second])
        (tmp_path / 'data/masks').mkdir(exist_ok=True)
        mask.save(tmp_path / f'data/masks/{i}.png')
    run(tmp_path, 'segmentation')
    assert values(tmp_path)['ids'] == ('#000000', '#00ff00', '#ff0000')


def test_palettes_that_agree_where_they_are_used(tmp_path):
    for i in range(6):
        images(tmp_path, f'images/{i}.jpg')
        mask = Image.fromarray((BANDS % 2).astype(np.uint8))
        mask.putpalette([0, 0, 0, 255, 0, 0, i, i, i])
        (tmp_path / 'data/masks').mkdir(exist_ok=True)
        mask.save(tmp_path / f'data/masks/{i}.png')
    run(tmp_path, 'segmentation')
    assert values(tmp_path)['ids'] == (0, 1)


@pytest.mark.parametrize('other', ['images/3.bmp', 'rgb/3.jpg'])
def test_two_images_of_one_mask(tmp_path, other):
    pairs(tmp_path)
    images(tmp_path, other)
    refused(tmp_path, 'segmentation', 'are both images of masks/3.png')


def test_lists_of_voc_masks(tmp_path):
    pairs(tmp_path, images_in='JPEGImages', masks_in='SegmentationClass')
    write(tmp_path, 'ImageSets/Segmentation/train.txt', '0\n4\n5\n')
    write(tmp_path, 'ImageSets/Segmentation/val.txt', '1\n3\n')
    said = run(tmp_path, 'segmentation')
    assert '3 train, 2 val' in said and '1 images beside them are not used: JPEGImages/2' in said
    assert listed(tmp_path, 'val') == ['JPEGImages/1.jpg', 'JPEGImages/3.jpg']


@pytest.mark.parametrize('content', [b'nope', b'\x89PNG\r\n\x1a\n', b''])
def test_damaged_masks(tmp_path, content):
    pairs(tmp_path)
    write(tmp_path, 'masks/3.png', content)
    refused(tmp_path, 'segmentation', 'masks/3.png is ')


def test_truncated_masks(tmp_path):
    pairs(tmp_path)
    mask = tmp_path / 'data/masks/3.png'
    save(mask, np.random.default_rng(0).integers(0, 3, (40, 60), np.uint8))
    mask.write_bytes(mask.read_bytes()[:300])
    refused(tmp_path, 'segmentation', 'masks/3.png is truncated')


def test_masks_of_another_size(tmp_path):
    pairs(tmp_path)
    save(tmp_path / 'data/images/2.jpg', np.zeros((80, 120, 3), np.uint8))
    refused(tmp_path, 'segmentation', 'images/2.jpg has 120 x 80 pixels, its mask .* 60 x 40')


@pytest.mark.parametrize(
    'image, mask',
    [
        ('images/label_{}.jpg', 'masks/label_{}.png'),
        ('my_seg/images/{}.jpg', 'my_seg/masks/{}.png'),
        ('{}/image.png', '{}/mask.png'),
    ],
)
def test_words_for_masks_in_other_places(tmp_path, image, mask):
    for i in range(6):
        images(tmp_path, image.format(i))
        save(tmp_path / 'data' / mask.format(i), (BANDS % 3).astype(np.uint8))
    assert '5 train, 1 val' in run(tmp_path, 'segmentation')
    assert listed(tmp_path, 'val')[0] in [image.format(i) for i in range(6)]


# -------------------------------------------------------------------------------- files of objects

BOX = '<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>'
BOX += '</bndbox></object>'
SQUARE = dict(label='cat', shape_type='polygon', points=[[5, 5], [30, 5], [30, 30], [5, 30]])


def voc(tmp_path, name, image, label='a'):
    write(
        tmp_path,
        name,
        f'<annotation><filename>{image}</filename>{BOX.format(label)}</annotation>',
    )


def labelme(tmp_path, name, image, *shapes):
    content = dict(shapes=list(shapes), imagePath=image, imageWidth=60, imageHeight=40)
    write(tmp_path, name, json.dumps(content))


@pytest.mark.parametrize('layout', ['voc', 'labelme'])
def test_files_that_name_another_image(tmp_path, layout):
    """As after renaming or copying: the image of the file's own name counts."""
    for i in range(6):
        images(tmp_path, f'{i}.jpg')
        named = '0.jpg' if i in (3, 4) else f'{i}.jpg'
        if layout == 'voc':
            voc(tmp_path, f'{i}.xml', named, f'kind {i}')
        else:
            labelme(tmp_path, f'{i}.json', named, SQUARE | dict(label=f'kind {i}'))
    run(tmp_path, 'detection')
    found = {}
    for split in ('train', 'val'):
        api = objects(tmp_path, split)
        for one in api.anns.values():
            name = api.imgs[one['image_id']]['file_name']
            found[name] = api.cats[one['category_id']]['name']
    assert found == {f'{i}.jpg': f'kind {i}' for i in range(6)}


def test_two_files_for_one_image(tmp_path):
    images(tmp_path, 'x.jpg', 'y.jpg')
    for name in 'abx':
        voc(tmp_path, f'{name}.xml', 'x.jpg')
    refused(tmp_path, 'detection', 'a.xml and b.xml are both for x.jpg')


def test_images_without_a_file(tmp_path):
    images(tmp_path, *(f'{i}.jpg' for i in range(5)))
    for i in range(3):
        voc(tmp_path, f'{i}.xml', f'{i}.jpg')
    assert '2 images have no xml file: not used: 3.jpg' in run(tmp_path, 'detection')


def test_names_with_spaces_in_lists_of_voc(tmp_path):
    names = [f'my img {i}' for i in range(6)]
    for name in names:
        images(tmp_path, f'JPEGImages/{name}.jpg')
        voc(tmp_path, f'Annotations/{name}.xml', f'{name}.jpg')
    write(tmp_path, 'ImageSets/Main/train.txt', '\n'.join(names[:3]))
    write(tmp_path, 'ImageSets/Main/val.txt', '\n'.join(f'{one}  -1' for one in names[3:5]))
    run(tmp_path, 'detection')
    assert files_in(tmp_path, 'val') == [f'JPEGImages/{one}.jpg' for one in names[3:5]]
    write(tmp_path, 'ImageSets/Main/val.txt', 'none')
    refused(tmp_path, 'detection', "val.txt lists 'none', which has no anno", overwrite=True)


def test_masks_of_labelme(tmp_path):
    """Drawn pixel by pixel, with holes; any shape with three points is an outline."""
    drawn = np.ones((30, 20), np.uint8) * 255
    drawn[10:20, 5:15] = 0
    stream = io.BytesIO()
    Image.fromarray(drawn).save(stream, 'png')
    mask = dict(label='ring', shape_type='mask', points=[[40, 8], [59, 37]])
    mask['mask'] = base64.b64encode(stream.getvalue()).decode()
    turned = dict(label='turned', shape_type='rotation', points=[[5, 0], [9, 4], [5, 8], [1, 4]])
    ignored = SQUARE | dict(label='__ignore__')
    for i in range(4):
        images(tmp_path, f'{i}.png')
        labelme(tmp_path, f'{i}.json', f'{i}.png', mask, turned, ignored)
    assert '4 points, lines and __ignore__ shapes' in run(tmp_path, 'detection')
    assert values(tmp_path)['classes'] == ('ring', 'turned')
    api = objects(tmp_path, 'val')
    ring, diamond = sorted(api.anns.values(), key=lambda one: one['category_id'])
    expected = np.zeros((40, 60), np.uint8)
    expected[8:38, 40:60] = drawn > 0
    assert (api.annToMask(ring) == expected).all() and ring['bbox'] == [40, 8, 20, 30]
    assert ring['area'] == 500 and diamond['area'] == 32


@pytest.mark.parametrize(
    'shape, wrong',
    [
        (SQUARE | dict(label=None), 'a shape has no label'),
        (dict(label='a', shape_type='spline', points=[[1, 1], [2, 2]]), "'spline' are not known"),
        (dict(label='a', shape_type='mask', points=[[1, 1]], mask='iVBO'), 'cannot be read'),
    ],
)
def test_shapes_that_are_refused(tmp_path, shape, wrong):
    images(tmp_path, 'a.png')
    labelme(tmp_path, 'a.json', 'a.png', shape)
    refused(tmp_path, 'detection', wrong)


def test_one_object_without_an_outline(tmp_path):
    for i in range(4):
        images(tmp_path, f'{i}.png')
        flat = dict(label='a', shape_type='rectangle', points=[[1, 1], [9, 9]])
        labelme(tmp_path, f'{i}.json', f'{i}.png', flat if i == 2 else SQUARE)
    assert '3 of 4 have outlines, 2.png has one without: boxes' in run(tmp_path, 'detection')


def test_another_broken_json(tmp_path):
    """It is no matter where the boxes are elsewhere."""
    yolo(tmp_path, 'images')
    write(tmp_path, 'notes.json', '{oops')
    assert '5 train, 1 val' in run(tmp_path, 'detection')
    labelme(tmp_path, 'images/0.json', '0.jpg', SQUARE)
    refused(tmp_path, 'detection', 'notes.json is no JSON', layout='labelme', overwrite=True)


# -------------------------------------------------------------------------------------------- YOLO

LABEL = '0 0.5 0.5 0.4 0.4\n1 0.25 0.25 0.2 0.2\n'


def yolo(tmp_path, *folders, names='names: [a, b]\n', number=6):
    for folder in folders:
        for i in range(number):
            images(tmp_path, f'{folder}/{i}.jpg')
            write(tmp_path, f'{folder.replace("images", "labels")}/{i}.txt', LABEL)
    if names:
        write(tmp_path, 'data.yaml', names)


def test_yolo_lists_of_images(tmp_path):
    splits = 'path: /of/another\ntrain: train.txt\nval: [val.txt, images/more]\n'
    yolo(tmp_path, 'images', 'images/more', names=splits + 'names: [a, b]\n')
    write(tmp_path, 'train.txt', ''.join(f'./images/{i}.jpg\n' for i in range(4)))
    write(tmp_path, 'val.txt', '/of/another/images/5.jpg\n')
    said = run(tmp_path, 'detection')
    assert '4 train, 7 val' in said and '1 images beside them are not used: images/4.jpg' in said
    assert 'images/5.jpg' in files_in(tmp_path, 'val')
    write(tmp_path, 'val.txt', 'images/9.jpg\n')
    refused(tmp_path, 'detection', 'val.txt lists images/9.jpg, which is mis', overwrite=True)
    write(tmp_path, 'val.txt', 'images/3.jpg\n')
    refused(tmp_path, 'detection', 'images/3.jpg is both in train and in val', overwrite=True)
    (tmp_path / 'data/val.txt').unlink()
    refused(tmp_path, 'detection', 'names val.txt for val, which is missing', overwrite=True)


def test_yolo_folders_within_folders(tmp_path):
    yolo(tmp_path, 'images', 'images/heldout')
    write(tmp_path, 'data.yaml', 'train: images\nval: images/heldout\nnames: [a, b]\n')
    run(tmp_path, 'detection')
    assert files_in(tmp_path, 'val') == [f'images/heldout/{i}.jpg' for i in range(6)]
    assert files_in(tmp_path, 'train') == [f'images/{i}.jpg' for i in range(6)]


def test_yolo_names_that_disagree(tmp_path):
    yolo(tmp_path, 'train', 'val', names='')
    for split, text in (('train', 'cat\ndog\n'), ('val', 'dog\ncat\n')):
        write(tmp_path, f'{split}/classes.txt', text)
    refused(tmp_path, 'detection', 'train/classes.txt and val/classes.txt name the classes diff')
    write(tmp_path, 'val/classes.txt', 'cat\ndog')
    assert '6 train, 6 val' in run(tmp_path, 'detection')


@pytest.mark.parametrize(
    'name, text, classes',
    [
        ('classes.txt', '\ufeffcat\ndog\n\n', ('cat', 'dog')),
        ('data.yaml', 'names: [yes, no]\n', ('yes', 'no')),
        ('data.yaml', 'names: {0: on, 1: 1.0}\n', ('on', '1.0')),
    ],
)
def test_yolo_names(tmp_path, name, text, classes):
    yolo(tmp_path, 'images', names='')
    write(tmp_path, name, text)
    run(tmp_path, 'detection')
    assert values(tmp_path)['classes'] == classes


@pytest.mark.parametrize(
    'name, text, wrong',
    [
        ('classes.txt', 'cat\n\ndog\n', 'class 1 is not in the yaml'),
        ('classes.txt', 'köpek\nkedi\n'.encode('latin-1'), 'classes.txt is no UTF-8 text'),
        ('labels/3.txt', b'0 0.5 0.5 0.4 0.4 \xff', '3.txt is no UTF-8 text'),
        ('data.yaml', 'kpt_shape: [2, 3]\nnames: [a, b]\n', 'is for key points'),
        ('images/3.png', b'x', '3.jpg and 3.png have one name'),
    ],
)
def test_yolo_that_is_refused(tmp_path, name, text, wrong):
    yolo(tmp_path, 'images', names='names: [a, b]\n' if name[0] in 'li' else '')
    write(tmp_path, name, text)
    refused(tmp_path, 'detection', wrong)


def test_a_yaml_beside_the_data(tmp_path):
    yolo(tmp_path, 'images', names='')
    write(tmp_path, '../settings/my.yaml', 'path: ../data\ntrain: images\nnames: [a, b]\n')
    assert '5 train, 1 val' in run(tmp_path, 'detection', data='settings/my.yaml')


# -------------------------------------------------------------------------------------------- COCO


def coco(tmp_path, name, files, categories=((1, 'a'), (2, 'b')), used=(1, 2), lacking=(), **change):
    shots = [dict(id=i, file_name=one, width=60, height=40) for i, one in enumerate(files)]
    found = []
    for i in range(len(files)):
        one = dict(id=i + 1, image_id=i, category_id=used[i % len(used)], bbox=[5, 6, 20, 30])
        one |= dict(area=600, iscrowd=0) | change
        found.append({k: v for k, v in one.items() if k not in lacking})
    listed = [dict(id=a, name=b) for a, b in categories]
    content = dict(images=shots, annotations=found, categories=listed)
    write(tmp_path, name, json.dumps(content))


NAMES = [f'{i}.png' for i in range(6)]


def test_folders_with_the_same_names(tmp_path):
    images(tmp_path, *(f'{folder}/{one}' for folder in ('photos', 'depth') for one in NAMES))
    coco(tmp_path, 'labels.json', NAMES)
    refused(tmp_path, 'detection', 'both depth and photos have its images')
    (tmp_path / 'data/depth/3.png').unlink()  # as soon as one is missing, it is the other
    run(tmp_path, 'detection')
    assert files_in(tmp_path, 'train')[0].startswith('photos/')
    (tmp_path / 'data/photos/4.png').unlink()
    refused(tmp_path, 'detection', 'of its 6 images, 3.png is missing', overwrite=True)


def test_coco_files_of_mixed_names(tmp_path):
    for split in ('train', 'val'):
        images(tmp_path, *(f'{split}/{split}{one}' for one in NAMES))
    coco(tmp_path, 'instances_train.json', [f'train{one}' for one in NAMES])
    coco(tmp_path, 'dev.json', [f'val{one}' for one in NAMES])
    coco(tmp_path, 'others.json', [f'val{one}' for one in NAMES])
    coco(tmp_path, 'person_keypoints_val.json', [f'val{one}' for one in NAMES])
    said = run(tmp_path, 'detection')
    assert '6 train, 6 val (as the folders say)' in said
    assert 'others.json is for no split: not used' in said


def test_images_in_two_coco_files(tmp_path):
    images(tmp_path, *(f'images/{one}' for one in NAMES))
    coco(tmp_path, 'train.json', NAMES)
    coco(tmp_path, 'val.json', NAMES[4:])
    assert 'note: 2 images are both in train and val' in run(tmp_path, 'detection')


def test_coco_without_areas(tmp_path):
    """They are those of the boxes, in files of the run's own."""
    images(tmp_path, *(f'images/{one}' for one in NAMES))
    coco(tmp_path, 'train.json', NAMES[:4], lacking=['area'])
    coco(tmp_path, 'val.json', NAMES[4:])
    run(tmp_path, 'detection')
    assert {one['area'] for one in objects(tmp_path, 'train').anns.values()} == {600}


@pytest.mark.parametrize(
    'options, wrong',
    [
        (dict(lacking=['bbox']), "lacks 'bbox' in .annotations., entry 0"),
        (dict(categories=((1, 'a'), (2, 'a'))), "2 categories with the name 'a'"),
        (dict(used=(1, 9)), 'no category 9'),
    ],
)
def test_coco_that_a_run_would_refuse(tmp_path, options, wrong):
    images(tmp_path, *(f'images/{one}' for one in NAMES))
    coco(tmp_path, 'all.json', NAMES, **options)
    refused(tmp_path, 'detection', wrong)


def test_coco_for_another_size(tmp_path):
    for one in NAMES:
        save(tmp_path / f'data/images/{one}', np.zeros((80, 120, 3), np.uint8))
    coco(tmp_path, 'all.json', NAMES)
    refused(tmp_path, 'detection', r'has 120 x 80 pixels, but .*all.json is for 60 x 40')


def test_categories_of_one_file_alone(tmp_path):
    for split in ('train', 'val'):
        images(tmp_path, *(f'{split}/{one}' for one in NAMES))
    coco(tmp_path, 'train.json', NAMES)
    coco(tmp_path, 'val.json', NAMES, ((1, 'a'), (2, 'b'), (3, 'c')), (1, 3))
    refused(tmp_path, 'detection', "val.json has objects of the category 3 'c', another file lacks")


def test_a_file_in_a_folder_beside_the_images(tmp_path):
    """CVAT's export, and names with whole paths."""
    images(tmp_path, *(f'images/{one}' for one in NAMES))
    file = 'annotations/instances_default.json'
    coco(tmp_path, file, [str(tmp_path / 'data/images' / one) for one in NAMES])
    assert '5 train, 1 val' in run(tmp_path, 'detection', data=f'data/{file}')
    assert files_in(tmp_path, 'val')[0].startswith('images/')


# ------------------------------------------------------------------------------ folders and splits


@pytest.mark.parametrize(
    'path, split',
    [
        ('freight train', None),
        ('train station/a', None),
        ('training_data/train', 'train'),
        ('training_data/val', 'val'),
        ('training_data', 'train'),
        ('train/dev', 'val'),
        ('images/train2017', 'train'),
        ('trainannot', 'train'),
        ('val_labels', 'val'),
        ('train_test', None),
        ('holdout', 'val'),
    ],
)
def test_folders_of_splits(path, split):
    assert split_of(path) == split


def test_files_of_splits():
    names = ('instances_val2017.json', 'my_val.json', 'train/all.json', 'train_test.json')
    assert [split_of_file(Path(one)) for one in names] == ['val', 'val', 'train', None]


def test_a_class_of_the_name_of_a_split(tmp_path):
    names = ('train', 'bus', 'car')
    images(tmp_path, *(f'{name}/{i}.jpg' for name in names for i in range(5)))
    run(tmp_path, 'classification')
    assert values(tmp_path)['classes'] == ('bus', 'car', 'train')


def test_splits_without_classes(tmp_path):
    images(tmp_path, *(f'{name}/{i}.jpg' for name in ('train', 'test') for i in range(5)))
    refused(tmp_path, 'classification', 'no class folders')


def test_a_folder_around_the_classes(tmp_path):
    images(tmp_path, *(f'flower_photos/{name}/{i}.jpg' for name in 'ab' for i in range(5)))
    run(tmp_path, 'classification')
    assert values(tmp_path)['classes'] == ('a', 'b')


def test_folders_that_are_almost_splits_are_named(tmp_path):
    for split in ('carvana_train', 'carvana_test'):
        pairs(tmp_path, images_in=f'{split}/images', masks_in=f'{split}/masks')
    said = run(tmp_path, 'segmentation')
    assert 'carvana_test, carvana_train are not taken for splits' in said


def test_a_link_to_a_parent(tmp_path):
    images(tmp_path, *(f'{name}/{i}.jpg' for name in 'ab' for i in range(5)))
    os.symlink('..', tmp_path / 'data/a/up')
    assert len(Tree(tmp_path / 'data').files) == 10


def test_two_configs_within_the_data(tmp_path):
    images(tmp_path, *(f'images/{one}' for one in NAMES))
    coco(tmp_path, 'all.json', NAMES)
    for name in ('one', 'two'):
        init(tmp_path / 'data' / name, 'detection', tmp_path / 'data')
    assert (tmp_path / 'data/two/val.json').exists()


def test_overwriting_leaves_nothing_of_the_earlier_call(tmp_path):
    images(tmp_path, *(f'{s}/{c}/{i}.jpg' for s in ('train', 'test') for c in 'ab' for i in '0123'))
    run(tmp_path, 'classification')
    assert (tmp_path / 'out/test.txt').exists()
    (tmp_path / 'data/test').rename(tmp_path / 'elsewhere')
    run(tmp_path, 'classification', overwrite=True)
    assert not (tmp_path / 'out/test.txt').exists()


def test_a_config_in_a_folder_with_an_apostrophe(tmp_path):
    images(tmp_path, *(f'{name}/{i}.jpg' for name in 'ab' for i in range(5)))
    out = tmp_path / "o'brien"
    init(out, 'classification', tmp_path / 'data')
    assert Config.fromfile(out / 'config.py').work_dir == f'{out}/run'


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
@pytest.mark.parametrize('orientation', [1, 6, 8, 9])
def test_sizes_are_those_that_a_run_sees(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f'a.{suffix}'
    Image.new('RGB', (60, 40)).save(path, exif=exif)
    assert size_of(path) == mmcv.imfrombytes(path.read_bytes()).shape[1::-1]
