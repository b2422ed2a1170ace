"""Predictions as JSON, in COCO's results format where it has one."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from fastvit_mm import pictures


def encode(mask: np.ndarray) -> dict:
    """COCO's run-length encoding of a bool mask (H, W)."""
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return dict(size=list(map(int, code['size'])), counts=code['counts'].decode())


def results(result, meta: dict, image_id: int) -> list[dict]:
    """A prediction as COCO results; ids count from 1."""
    if 'pred_verts' in result:
        names = ('pred_xyz', 'pred_verts', 'pred_uv')
        return [dict(image_id=image_id, **{n[5:]: result.get(n).tolist() for n in names})]
    if 'embedding' in result:
        return [dict(image_id=image_id, embedding=result['embedding'].tolist())]
    if isinstance(result, dict):
        best = pictures.likeliest(result)
        labels = [pictures.class_name(meta, label) for label in best]
        scores = [float(result['pred_scores'][label]) for label in best]
        ids = [label + 1 for label in best]
        return [dict(image_id=image_id, category_ids=ids, labels=labels, scores=scores)]
    if 'pred_instances' in result:
        found = result.pred_instances.cpu().numpy()
        records = []
        for index, (left, top, right, bottom) in enumerate(found.bboxes.tolist()):
            one = dict(image_id=image_id, category_id=int(found.labels[index]) + 1)
            one.update(score=float(found.scores[index]))
            one.update(bbox=[left, top, right - left, bottom - top])
            if 'masks' in found:
                one.update(segmentation=encode(found.masks[index]))
            records.append(one)
        return records
    field = result.pred_sem_seg.data[0].cpu().numpy()
    return [
        dict(image_id=image_id, category_id=label + 1, segmentation=encode(field == label))
        for label in np.unique(field).tolist()
    ]


def write_json(out: Path, name: str, images: list, found: list, meta: dict) -> None:
    names = meta.get('classes') or ()
    categories = [dict(id=index + 1, name=str(one)) for index, one in enumerate(names)]
    known = dict(info={}, images=images, categories=categories, annotations=[])
    for kind, content in (('predictions', found), ('images', known)):
        (out / f'{name}.{kind}.json').write_text(json.dumps(content) + '\n')
