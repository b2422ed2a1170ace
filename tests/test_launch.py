"""What the tools share."""

import pytest
from mmengine.config import Config

from fastvit_mm import FastViTError
from fastvit_mm.launch import check_data

COCO = dict(
    type='CocoDataset',
    ann_file='annotations/train.json',
    data_prefix=dict(img='train2017/'),
)
FOLDERS = dict(type='ImageNet', split='train')
PIXELS = dict(type='ADE20KDataset', data_prefix=dict(img_path='images', seg_map_path='labels'))


@pytest.mark.parametrize(
    'dataset, paths',
    [
        (COCO, ['annotations/train.json', 'train2017']),
        (FOLDERS, ['train']),
        (PIXELS, ['images', 'labels']),
        (dict(type='RepeatDataset', dataset=COCO), ['annotations/train.json', 'train2017']),
        (dict(type='ConcatDataset', datasets=[FOLDERS, PIXELS]), ['train', 'images', 'labels']),
    ],
    ids=['coco', 'folders', 'pixels', 'inside another', 'several'],
)
def test_every_part_of_a_data_set_is_looked_for(dataset, paths, tmp_path):
    """A root with one part missing, whichever it is, is no data set."""

    def rooted(node):
        inner = [rooted(one) for one in node.get('datasets', [])]
        if inner:
            return {**node, 'datasets': inner}
        if 'dataset' in node:
            return {**node, 'dataset': rooted(node['dataset'])}
        return {**node, 'data_root': str(tmp_path)}

    cfg = Config(dict(train_dataloader=dict(dataset=rooted(dataset))))
    for path in paths:
        (tmp_path / path).mkdir(parents=True)
    check_data(cfg, 'train', 'val')
    for path in paths:
        (tmp_path / path).rename(tmp_path / 'away')
        with pytest.raises(FastViTError, match=f'{tmp_path / path} is missing') as caught:
            check_data(cfg, 'train')
        assert all(other in str(caught.value) for other in paths if dataset in (COCO, PIXELS))
        check_data(cfg, 'val')
        (tmp_path / 'away').rename(tmp_path / path)
