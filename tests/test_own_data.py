"""Data sets that a run can read are not refused: own classes, other formats, other storage."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import test_bad_data
from bad_data import FOLDERS, change
from mmcv.transforms import LoadAnnotations
from mmdet.datasets import CocoDataset
from mmengine.dataset import BaseDataset, Compose
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from mmpretrain.datasets import CustomDataset
from PIL import Image
from test_bad_data import agree, fine
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from fastvit_mm import FastViTError
from fastvit_mm.data import SPOILS, STOPS, class_folders, coco, datasets_in, guard
from fastvit_mm.data.check import annotation_problems
from fastvit_mm.data.listing import Folders, loader_problems
from fastvit_mm.data.paths import check_paths
from fastvit_mm.data.reading import NamedPipeline

drawn, data = test_bad_data.drawn, test_bad_data.data


# ------------------------------------------------------------------------------------------ masks


def read_masks(dataset, scope):
    """All masks of a data set, as its own pipeline loads them."""
    with DefaultScope.overwrite_default_scope(scope):
        built = DATASETS.build(dataset)
        guard(built)
        return [built[i]['gt_seg_map'] for i in range(len(built))]


def with_stuff(data):
    """mmdet's objects, and a mask of ids that are none of the objects' classes."""
    one = data('detection')
    dataset = one.cfg.test_dataloader.dataset
    for path in one.images(1):
        with Image.open(path) as image:
            Image.new('L', image.size, 120).save(path.with_suffix('.png'))
    folder = FOLDERS['detection'][1].split('/', 1)[1] + '/'
    dataset.data_prefix.seg = folder
    dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_seg=True),
    ]
    return dataset


def test_masks_beside_objects(data):
    """As HTC learns them: 183 classes of stuff and things beside 80 things."""
    assert {int(mask.max()) for mask in read_masks(with_stuff(data), 'mmdet')} == {120}


@TRANSFORMS.register_module()
class LoadArrays(LoadAnnotations):
    """Masks in another format than mmseg's."""

    def transform(self, results):
        results['gt_seg_map'] = np.load(results['seg_map_path'])
        return results


def test_masks_that_a_project_loads(data):
    one = data('segmentation')
    for split in (0, 1):
        for image in one.images(split):
            path = one.mask(image)
            np.save(path.with_suffix('.npy'), np.asarray(Image.open(path)).astype(np.int32) + 300)
    dataset = one.cfg.test_dataloader.dataset
    dataset.seg_map_suffix = '.npy'
    dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='mmengine.LoadArrays')]
    assert min(mask.min() for mask in read_masks(dataset, 'mmseg')) >= 300
    assert not [p for p in one.check().problems if p.file.endswith('.npy')]


class Bucket(LocalBackend):
    """Storage whose paths are none of this machine's, as Petrel's with its path_mapping."""

    def __init__(self, root):
        self.root = root

    def get(self, filepath):
        return super().get(str(filepath).replace('/bucket', self.root))

    @contextmanager
    def get_local_path(self, filepath):
        yield str(filepath).replace('/bucket', self.root)


def test_files_in_other_storage(data):
    register_backend('bucket', Bucket, force=True)
    one = data('detection')
    args = dict(backend='bucket', root=str(one.folder / 'coco'))
    for stage in ('train', 'val', 'test'):
        dataset = one.cfg[f'{stage}_dataloader'].dataset
        dataset.update(data_root='/bucket', backend_args=args)
        for step in dataset.pipeline:
            if step['type'] == 'LoadImageFromFile':
                step['backend_args'] = args
    fine(one)


# ---------------------------------------------------------------------------- classes and pipelines


class Numbers(TorchDataset):
    """A data set of a project's own, with nothing in common with mmengine's."""

    def __init__(self, broken=False, **_):
        self.pipeline = lambda number: number
        self.dataset, self.broken = 'numbers', broken

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if self.broken and index == 1:
            raise OSError('the number 1 is torn')
        return self.pipeline(index)


class OwnCompose(Compose):
    def __call__(self, data):
        return 'own'


def test_own_pipelines_are_left_alone():
    guard(own := Numbers())
    assert own[2] == 2
    own.pipeline = Compose([])
    guard(own)
    assert type(own.pipeline) is Compose
    usual = BaseDataset(lazy_init=True)
    guard(usual)
    assert type(usual.pipeline) is NamedPipeline
    usual.pipeline = OwnCompose([])
    guard(usual)
    assert usual.pipeline({}) == 'own'


def test_own_data_sets_are_read(data):
    """Named in a config by their class, without a data_root."""
    one = data('classification')
    loader = one.cfg.train_dataloader
    loader.dataset = dict(type=Numbers)
    loader.collate_fn = dict(type='default_collate')
    loader.batch_size = 3
    assert [*datasets_in(loader)] == [loader.dataset]
    fine(one)
    loader.dataset.broken = True
    (found,) = one.check().problems
    assert (found.file, found.level) == ('Numbers, sample 1', STOPS)
    assert 'OSError: the number 1 is torn' in found.wrong


class Pairs:
    """A batch sampler of one's own."""

    def __iter__(self):
        yield [0, 1]


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


def test_own_loaders():
    for loader in (
        DataLoader(Numbers(), batch_sampler=Pairs()),
        DataLoader(Numbers(), batch_size=None),
        DataLoader(Stream(), batch_size=2),
    ):
        assert not [*loader_problems(loader)]
    (few,) = loader_problems(DataLoader(Numbers(), batch_size=4, drop_last=True))
    assert 'gives 3 images, fewer than a batch of 4' in few.wrong


@DATASETS.register_module()
class CommaDataset(CustomDataset):
    """Lists of lines "name,label"."""

    def load_data_list(self):
        lines = (line.split(',') for line in Path(self.ann_file).read_text().splitlines())
        return [dict(img_path=f'{self.img_prefix}/{n}', gt_label=int(i)) for n, i in lines]


def test_own_lists_of_labels(data):
    one = data('classification')
    dataset = one.cfg.test_dataloader.dataset
    root = one.folder / 'imagenet/val'
    (one.folder / 'imagenet/val.csv').write_text(
        '\n'.join(f'{p.relative_to(root)},1' for p in one.images(1))
    )
    dataset.update(type='mmengine.CommaDataset', ann_file='val.csv')
    dataset.pop('split', None)
    dataset.data_prefix = 'val'
    assert one.read('test') is None


# ---------------------------------------------------------------------------------- files and names


@pytest.mark.parametrize('root', ['./', '/', '.', ''])
def test_roots_that_hold_everything(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd/a.jpg').touch()
    (tmp_path / 'b.jpg').touch()
    folder = tmp_path if root == '/' else root
    known = Folders([root] if root else [])
    for name in ('d/a.jpg', 'b.jpg'):
        assert not [*known.problems(os.path.join(folder, name))]
    (missing,) = known.problems(os.path.join(folder, 'd/b.jpg'))
    assert missing.wrong == 'does not exist'
    if root in ('./', '.'):
        (outside,) = known.problems('../x.jpg')
        assert 'lies outside' in outside.wrong


def test_names_in_another_spelling(tmp_path, monkeypatch):
    """A file system that finds a name which it lists in another case or Unicode form."""
    (tmp_path / 'A.jpg').touch()
    monkeypatch.setattr(os, 'listdir', lambda folder: ['a.jpg'])
    assert not [*Folders([str(tmp_path)]).problems(str(tmp_path / 'A.jpg'))]


def test_class_folders_without_a_root(data):
    one = data('classification')
    dataset = one.cfg.train_dataloader.dataset
    dataset.data_prefix = f'{dataset.pop("data_root")}/train'
    dataset.pop('split', None)
    fine(one)
    (folder := one.folder / 'imagenet/train').rename(one.folder / 'elsewhere')
    agree(one, 'train', folder, 'does not exist')


def test_links_in_class_folders(data):
    """Images may lie in folders that are linked into those of the classes."""
    one = data('classification')
    for split in ('train', 'val'):
        for folder in sorted((one.folder / 'imagenet' / split).iterdir()):
            away = one.folder / 'away' / split / folder.name
            away.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(away)
            folder.mkdir()
            (folder / 'linked').symlink_to(away)
            (folder / '.hidden').touch()
    fine(one)
    (folder / 'linked').unlink()
    (folder / '.hidden.jpg').touch()
    agree(one, 'test', folder, 'holds no images', SPOILS)


def test_a_class_folder_is_left_at_its_first_image(tmp_path, monkeypatch):
    """ImageNet has a thousand images in each: listing them all takes minutes on a network."""
    for name in 'ab':
        (tmp_path / name).mkdir()
        for number in range(50):
            (tmp_path / name / f'{number}.jpg').touch()
    seen, scandir = [], os.scandir

    class Counted:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            for entry in self.entries:
                seen.append(entry.name)
                yield entry

    monkeypatch.setattr(os, 'scandir', Counted)
    config = dict(type='CustomDataset', data_root=str(tmp_path))
    assert not [*class_folders.label_problems([config])]
    assert len([name for name in seen if name.endswith('.jpg')]) == 2


def test_paths_that_need_not_be_there(data, tmp_path, monkeypatch):
    """CIFAR10 fetches its files, CUB has no folders named as its splits, others must be there."""
    cfg = data('classification').cfg
    monkeypatch.chdir(tmp_path)
    (root := Path('cub')).mkdir()
    for kind, folder in (('CIFAR10', 'none'), ('CUB', root), ('mmpretrain.CIFAR10', 'none')):
        cfg.train_dataloader.dataset = dict(type=kind, data_root=str(folder), split='train')
        check_paths(cfg, 'train')
    for kind, folder in (('CUB', 'none'), ('ImageNet', root)):
        cfg.train_dataloader.dataset = dict(type=kind, data_root=str(folder), split='train')
        with pytest.raises(FastViTError, match='data set not found'):
            check_paths(cfg, 'train')


# ------------------------------------------------------------------------------------------- COCO


@pytest.mark.parametrize('kind', ['LVISV1Dataset', 'CocoPanopticDataset'])
def test_other_formats_than_coco(tmp_path, kind):
    """LVIS has URLs instead of names, panoptic annotations have boxes further down."""
    image = dict(id=1, coco_url='http://x.org/train2017/1.jpg', width=9, height=9)
    content = dict(images=[image], annotations=[], categories=[dict(id=1, name='a')])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    config = dict(type=kind, data_root=str(tmp_path), ann_file='a.json')
    assert not [*annotation_problems([config])]
    config['type'] = 'CocoDataset'
    assert any('file_name' in problem.wrong for problem in annotation_problems([config]))


def test_a_class_instead_of_its_name(data):
    one = data('detection')
    for stage in ('train', 'val', 'test'):
        one.cfg[f'{stage}_dataloader'].dataset.type = CocoDataset
    fine(one)
    change(one.lists(1), lambda c: c['images'][0].pop('file_name') and None)
    agree(one, 'test', one.lists(1), "lacks 'file_name'")


def test_a_missing_file_is_called_so(data):
    one = data('detection')
    one.lists(1).unlink()
    with pytest.raises(FastViTError, match='cannot be read: No such file') as error:
        coco.SoundCOCO(one.lists(1))
    assert 'JSON' not in str(error.value)
