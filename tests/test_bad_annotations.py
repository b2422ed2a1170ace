"""The table of docs/data.md for COCO's annotations."""

import numpy as np
import pytest
import test_bad_data
import torch
from bad_data import FOLDERS, change
from mmengine.registry import DATASETS, METRICS, DefaultScope
from pycocotools.coco import COCO
from test_bad_data import WHERE, agree, fine

from fastvit_mm.data import NOTE, SPOILS, STOPS
from fastvit_mm.demo.scenes import CLASSES

drawn, data = test_bad_data.drawn, test_bad_data.data


def first(content):
    return content['annotations'][0]


def edit(part, index=0, **values):
    def apply(content):
        content[part][index].update(values)

    return apply


def drop(part, key):
    return lambda content: content[part][1].pop(key) and None


def same_ids(content):
    for image in content['images']:
        image['id'] = 1


COCOS = {  # what to do, the words, the level
    'a list': (lambda c: [c], 'holds a list', STOPS),
    'no images key': (lambda c: c.pop('images') and None, 'lacks "images"', STOPS),
    'no categories': (lambda c: c.pop('categories') and None, 'lacks "categories"', STOPS),
    'no images': (lambda c: c.update(images=[]), 'has nothing in "images"', STOPS),
    'no file_name': (drop('images', 'file_name'), 'lacks \'file_name\' in "images"', STOPS),
    'no width': (drop('images', 'width'), "lacks 'width'", STOPS),
    'no bbox': (drop('annotations', 'bbox'), 'lacks \'bbox\' in "annotations", entry 1', STOPS),
    'no area': (drop('annotations', 'area'), "lacks 'area'", STOPS),
    'no name': (drop('categories', 'name'), "lacks 'name'", STOPS),
    'a list as id': (edit('images', id=[1]), 'has \'id\': [1] in "images"', STOPS),
    'the same ids': (same_ids, 'images with the id 1', STOPS),
    'twice': (edit('annotations', 1, id=1), 'has 2 annotations with the id 1', STOPS),
    'same names': (edit('categories', name='cross'), "2 categories with the name 'cross'", STOPS),
    'a size of 0': (edit('images', width=0), 'a size of 0 x', STOPS),
    'NaN': (edit('annotations', bbox=[1, 2, float('nan'), 4]), 'the box [1, 2, nan, 4]', STOPS),
    'infinite': (edit('annotations', bbox=[1, 2, float('inf'), 4]), 'the box [1, 2, inf', STOPS),
    'two numbers': (edit('annotations', bbox=[1, 2]), 'has the box [1, 2]', STOPS),
    'unknown category': (edit('annotations', category_id=99), 'no category 99', STOPS),
    'no such class': (edit('categories', name='cat'), "lacks the category 'circle'", STOPS),
    'a polygon of NaN': (
        edit('annotations', segmentation=[[1, 2, 3, 4, float('nan'), 5]]),
        'outline that is no list of finite',
        STOPS,
    ),
    'a name': (edit('annotations', segmentation='x'), 'neither polygons nor', STOPS),
    'negative': (edit('annotations', bbox=[5, 5, -3, 4]), 'has a box of no size', SPOILS),
    'outside': (edit('annotations', bbox=[900, 5, 3, 4]), 'a box outside its image', SPOILS),
    'unknown image': (edit('annotations', image_id=77), 'has no image 77', SPOILS),
    'two points': (
        edit('annotations', segmentation=[[1, 2, 30, 40]]),
        'outline of less than three points in annotation 1',
        SPOILS,
    ),
    'no annotations': (lambda c: c.pop('annotations') and None, 'has no "annotations"', SPOILS),
    'another category': (
        lambda c: c['categories'].append(dict(id=9, name='cat')),
        "has the category 'cat', which the config has not",
        NOTE,
    ),
    'leaves its image': (edit('annotations', bbox=[5, 5, 200, 9]), 'leaves its image', NOTE),
}


@pytest.mark.parametrize('stage', WHERE)
@pytest.mark.parametrize('case', COCOS)
def test_annotations(data, stage, case):
    one = data('detection')
    file = one.lists(WHERE[stage])
    damage, words, level = COCOS[case]
    change(file, damage)
    if case == 'no annotations' and stage == 'train':  # images without objects are left out
        said = one.read(stage)
        assert str(file) in said and 'gives no images with objects of the classes' in said
    else:
        agree(one, stage, file, words, level)


@pytest.mark.parametrize('stage', WHERE)
def test_broken_json(data, stage):
    one = data('detection')
    file = one.lists(WHERE[stage])
    whole = file.read_bytes()
    for content in (b'', whole[:-20], b'\xff\xfe\x00', b'[' * 100000):
        file.write_bytes(content)
        agree(one, stage, file, 'is no JSON')


@pytest.mark.parametrize('stage', WHERE)
@pytest.mark.parametrize('name', ['../../secret.jpg', '/etc/secret.jpg'])
def test_names_that_leave_the_folder(data, stage, name):
    one = data('detection')
    split = WHERE[stage]
    change(one.lists(split), edit('images', 1, file_name=name))
    folder = one.folder / FOLDERS['detection'][split]
    said = one.read(stage)
    assert 'secret.jpg lies outside' in said and str(folder) in said
    found = one.check().problems
    assert any(p.file.endswith(name) and p.level == STOPS for p in found)


def test_objects_without_outlines(data):
    """A config that learns masks says so; pycocotools' metric never sees them."""
    one = data('detection')
    change(one.lists(1), edit('annotations', segmentation=[]))
    path = one.images(1)[0]
    agree(one, 'test', path, 'an object without an outline')


def by_image(file):
    """Names of the objects in each image, by pycocotools' own look-up."""
    coco = COCO(str(file))
    return {
        image['file_name']: [
            coco.loadCats(one['category_id'])[0]['name'] for one in coco.imgToAnns[image['id']]
        ]
        for image in coco.dataset['images']
    }


@pytest.mark.parametrize('order', [[4, 0, 2, 1, 3], [4, 3, 2, 1, 0]])
def test_labels_follow_the_names_of_the_config(data, order):
    one = data('detection')
    wanted = by_image(one.lists(1))
    for split in (0, 1):
        change(
            one.lists(split),
            lambda c: c.update(categories=[c['categories'][i] for i in order]),
        )
    assert by_image(one.lists(1)) == wanted
    fine(one)
    cfg = one.cfg
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        metric = METRICS.build(cfg.test_evaluator)
    names = dataset.metainfo['classes']
    for index in range(len(dataset)):
        sample = dataset.get_data_info(index)
        got = [names[one['bbox_label']] for one in sample['instances']]
        assert got == wanted[sample['img_path'].rsplit('/', 1)[1]]
    assert perfect(metric, one.lists(1)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize('in_processes', [False, True])
def test_the_ap_of_a_class_bears_its_name(data, in_processes):
    """The config's order is neither that of the file nor that of the ids."""
    one = data('detection')
    change(one.lists(1), lambda c: c.update(categories=c['categories'][::-1]))
    with DefaultScope.overwrite_default_scope('mmdet'):
        metric = METRICS.build(
            {**one.cfg.test_evaluator, 'classwise': True, 'use_mp_eval': in_processes}
        )
    coco, order = COCO(str(one.lists(1))), [CLASSES[i] for i in (3, 1, 4, 0, 2)]
    present = {coco.cats[annotation['category_id']]['name'] for annotation in coco.anns.values()}
    found = sorted(present)[:2]
    others = [i for i, a in coco.anns.items() if coco.cats[a['category_id']]['name'] not in found]
    results = evaluated(metric, one.lists(1), others, order)
    for name in sorted(present):
        wanted = pytest.approx(float(name in found), abs=1e-3)
        assert results[f'coco/{name}_precision'] == wanted, (name, found, results)
        assert metric._coco_api.precision['segm'][order.index(name)] == wanted
    assert results['coco/segm_mAP'] == pytest.approx(len(found) / len(present), abs=1e-3)


def perfect(metric, file, leave_out=()):
    """The mask AP of :func:`evaluated`."""
    return evaluated(metric, file, leave_out)['coco/segm_mAP']


def evaluated(metric, file, leave_out=(), classes=CLASSES):
    """Metrics of predictions that are the truth of a file, but for some annotations."""
    metric.dataset_meta = dict(classes=classes)
    coco = COCO(str(file))
    for image in coco.dataset['images']:
        found = [one for one in coco.imgToAnns[image['id']] if one['id'] not in leave_out]
        names = [coco.loadCats(one['category_id'])[0]['name'] for one in found]
        boxes = torch.tensor([one['bbox'] for one in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        shape = (image['height'], image['width'])
        masks = np.array([coco.annToMask(one) for one in found], bool).reshape(-1, *shape)
        labels = torch.tensor([classes.index(name) for name in names]).long()
        pred = dict(bboxes=boxes, labels=labels, scores=torch.ones(len(found)))
        pred['masks'] = torch.from_numpy(masks)
        metric.process({}, [dict(pred_instances=pred, img_id=image['id'], ori_shape=shape)])
    return metric.evaluate(len(coco.imgs))


def test_an_outline_of_two_points_is_ignored_by_the_metric(data):
    """pycocotools takes it for a box; nobody predicts it, and nobody should."""
    one = data('detection')
    change(one.lists(1), edit('annotations', segmentation=[[1, 2, 30, 40]]))
    cfg = one.cfg
    with DefaultScope.overwrite_default_scope('mmdet'):
        metric = METRICS.build(cfg.test_evaluator)
    assert perfect(metric, one.lists(1), leave_out=[1]) == pytest.approx(1, abs=1e-3)
