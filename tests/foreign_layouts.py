"""The demo's scenes in the layouts in which people have their own data."""

import json

import cv2
import numpy as np

from fastvit_mm.demo.scenes import CLASSES, FINE, contours, draw_scene, save

SIZE = 64


def scenes(number, objects=(1, 2), area=(0.12, 0.28), seed=0):
    """``number`` scenes whose first objects go through the classes in turn."""
    for index in range(number):
        rng = np.random.default_rng([seed, index])
        count = rng.integers(objects[0], objects[1] + 1)
        labels = [index % len(CLASSES), *rng.integers(len(CLASSES), size=count - 1)]
        yield draw_scene(rng, SIZE, SIZE + 16 * (index % 2), labels, area)


def outline(one):
    """The polygon of an object in pixels: K x 2."""
    line = cv2.approxPolyDP(contours(one.mask)[0][0], 0.9, True)[:, 0]
    return (line + 0.5) / FINE


def mask_of(scene, ids, nothing=0):
    """Class ids per pixel: ``ids[label]`` where an object is."""
    height, width = scene.image.shape[:2]
    fine = np.full(scene.clutter.shape, nothing, np.int64)
    for one in scene.instances:
        fine[one.mask] = ids[one.label]
    return fine[FINE // 2 :: FINE, FINE // 2 :: FINE].reshape(height, width)


def class_folders(root, number, where='{name}/{index:04d}.jpg', **kwargs):
    for index, scene in enumerate(scenes(number, objects=(1, 1), **kwargs)):
        name = CLASSES[scene.instances[0].label]
        save(root / where.format(name=name, index=index), scene.image)


def images_and_masks(root, number, ids=(1, 2, 3, 4, 5), nothing=0, where=('images', 'masks'), **kw):
    for index, scene in enumerate(scenes(number, **kw)):
        save(root / where[0] / f'{index:04d}.jpg', scene.image)
        save(root / where[1] / f'{index:04d}.png', mask_of(scene, ids, nothing).astype(np.uint8))


def coco(root, number, ids=(7, 3, 20, 11, 5), file='labels.json', folder='photos', **kwargs):
    """Categories with gaps, in another order than their names, and listed in the given order."""
    images, annotations = [], []
    for index, scene in enumerate(scenes(number, **kwargs)):
        name = f'{index:04d}.jpg'
        save(root / folder / name, scene.image)
        height, width = scene.image.shape[:2]
        images.append(dict(id=index + 1, file_name=name, height=height, width=width))
        for one in scene.instances:
            line = outline(one)
            low, high = line.min(0), line.max(0)
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=ids[one.label],
                    segmentation=[line.ravel().tolist()],
                    bbox=[*low.tolist(), *(high - low).tolist()],
                    area=float(cv2.contourArea(line.astype(np.float32))),
                    iscrowd=0,
                )
            )
    categories = [dict(id=i, name=name) for i, name in zip(ids, CLASSES, strict=True)]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))


def yolo(root, number, outlines=False, **kwargs):
    for index, scene in enumerate(scenes(number, **kwargs)):
        save(root / 'images' / f'{index:04d}.jpg', scene.image)
        height, width = scene.image.shape[:2]
        rows = []
        for one in scene.instances:
            line = outline(one) / (width, height)
            low, high = line.min(0), line.max(0)
            values = line.ravel() if outlines else [*((low + high) / 2), *(high - low)]
            rows.append(' '.join([str(one.label), *(f'{v:.6f}' for v in values)]))
        path = root / 'labels' / f'{index:04d}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(rows) + '\n')
    names = ''.join(f'  {i}: {name}\n' for i, name in enumerate(CLASSES))
    (root / 'data.yaml').write_text(f'path: .\ntrain: images\nval: images\nnames:\n{names}')


OBJECT = """<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{0}</xmin>\
<ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def voc(root, number, **kwargs):
    for index, scene in enumerate(scenes(number, **kwargs)):
        save(root / 'JPEGImages' / f'{index:04d}.jpg', scene.image)
        height, width = scene.image.shape[:2]
        objects = ''
        for one in scene.instances:
            line = outline(one)
            box = [*(np.floor(line.min(0)) + 1), *np.ceil(line.max(0))]  # pixels from 1, inclusive
            objects += OBJECT.format(*map(int, box), name=CLASSES[one.label])
        size = f'<size><width>{width}</width><height>{height}</height><depth>3</depth></size>'
        path = root / 'Annotations' / f'{index:04d}.xml'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'<annotation><filename>{index:04d}.jpg</filename>{size}{objects}</annotation>'
        )


def labelme(root, number, **kwargs):
    for index, scene in enumerate(scenes(number, **kwargs)):
        save(root / f'{index:04d}.jpg', scene.image)
        height, width = scene.image.shape[:2]
        shapes = [
            dict(
                label=CLASSES[one.label],
                points=outline(one).tolist(),
                group_id=None,
                shape_type='polygon',
                flags={},
            )
            for one in scene.instances
        ]
        content = dict(version='5.4.1', flags={}, shapes=shapes, imagePath=f'{index:04d}.jpg')
        content.update(imageData=None, imageHeight=height, imageWidth=width)
        (root / f'{index:04d}.json').write_text(json.dumps(content))
