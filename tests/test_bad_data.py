"""The table of docs/data.md: bad data are handled, or one line names the file, in train and test,
and tools/check_data.py lists them."""

import gc
import shutil

import numpy as np
import pytest
from bad_data import CONFIGS, FOLDERS, Data, bomb, change, draw, encoded, sixteen, turned
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image, ImageOps

from fastvit_mm.data import NOTE, SPOILS, STOPS, decode
from fastvit_mm.demo.scenes import CLASSES

WHERE = {'train': 0, 'test': 1}
tasks = pytest.mark.parametrize('task', CONFIGS)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = draw(tmp_path_factory.mktemp('drawn'), patch)
    # Each data set collects garbage, which takes half a second among so many modules.
    for task in CONFIGS:
        Data(task, folder).read('test')
    gc.freeze()
    yield folder
    gc.unfreeze()


@pytest.fixture
def data(drawn, tmp_path):
    """A task's data, to damage."""

    def copy(task):
        part = FOLDERS[task][0].split('/')[0]
        shutil.copytree(drawn / part, tmp_path / part)
        return Data(task, tmp_path)

    return copy


def agree(data, stage, file, words, level=STOPS):
    """A run of this stage stops with one line on ``file`` (or ends, if that is not the level), and
    the check lists it."""
    said = data.read(stage)
    if level == STOPS:
        assert said and str(file) in said and words in said, said
        assert '\n' not in said and len(said) < 400
    else:
        assert said is None
    report = data.check()
    listed = [p for p in report.problems if p.file == str(file) and words in p.wrong]
    assert listed and all(p.level == level and p.then for p in listed), report
    assert report.sound == (level == NOTE)


def fine(data, *stages):
    for stage in stages or WHERE:
        assert data.read(stage) is None
    report = data.check()
    assert not report.problems
    assert sum(report.images.values()) > 3


@tasks
def test_sound_data(data, task):
    fine(data(task))


# ----------------------------------------------------------------------------------------- images

BROKEN = {
    'zero-byte': (lambda old: b'', 'is empty'),
    'truncated': (lambda old: old[: len(old) // 2], 'is truncated or damaged'),
    'text': (lambda old: b'not an image, but a page that says 404', 'is no image'),
    'bomb': (lambda old: bomb(), 'is too large: Image size (2500000000 pixels)'),
}


@tasks
@pytest.mark.parametrize('stage', WHERE)
@pytest.mark.parametrize('case', BROKEN)
def test_broken_image(data, task, stage, case):
    one = data(task)
    path = one.images(WHERE[stage])[-1]
    damage, words = BROKEN[case]
    path.write_bytes(damage(path.read_bytes()))
    agree(one, stage, path, words)


KINDS = {  # bytes, and what should be seen: RGB
    'grayscale': lambda i: (encoded(i.convert('L'), 'PNG'), i.convert('L').convert('RGB')),
    'CMYK': lambda i: (encoded(i.convert('CMYK'), 'JPEG', quality=95), i),
    '16-bit': lambda i: (encoded(sixteen(i), 'PNG'), i.convert('L').convert('RGB')),
    'RGBA': lambda i: (encoded(Image.merge('RGBA', (*i.split(), i.split()[0])), 'PNG'), i),
    'palette': lambda i: (encoded(q := i.quantize(64), 'PNG'), q.convert('RGB')),
    'EXIF': lambda i: (turned(i), i),
}


@pytest.mark.parametrize('kind', KINDS)
def test_unusual_images_look_as_they_should(drawn, kind):
    photo = Image.open(Data('segmentation', drawn).images(0)[0]).convert('RGB')
    content, seen = KINDS[kind](photo)
    got = decode(content)[..., ::-1].astype(int)
    assert got.shape == (photo.height, photo.width, 3)
    # one step is rounding; JPEG differs a little everywhere
    assert np.abs(got - np.asarray(seen, int)).mean() < (4 if kind in ('CMYK', 'EXIF') else 1)


@tasks
@pytest.mark.parametrize('kind', KINDS)
def test_unusual_images_are_read(data, task, kind):
    one = data(task)
    for split in (0, 1):
        path = one.images(split)[0]
        photo = Image.open(path).convert('RGB')
        path.write_bytes(KINDS[kind](photo)[0])
    assert one.read('train') is one.read('test') is None
    report = one.check()
    placed = kind == 'EXIF' and task in ('detection', 'segmentation')
    assert [p.level for p in report.problems] == [NOTE, NOTE][: 2 * placed], report


SIZES = {(1, 1): ('segmentation',), (60, 1): (), (20000, 10): ('segmentation', 'detection')}


@tasks
@pytest.mark.parametrize('size', SIZES)
def test_sizes(data, task, size):
    """Handled, except where the config's sizes leave no pixel of it."""
    one = data(task)
    path = one.images(1)[0]
    Image.new('RGB', size, 'red').save(path)
    if task == 'segmentation':
        Image.new('L', size, 1).save(one.mask(path))
    if task == 'detection':
        change(one.lists(1), lambda c: c['images'][0].update(width=size[0], height=size[1]))
        change(one.lists(1), lambda c: c.update(annotations=c['annotations'][5:]))
    if task in SIZES[size]:
        agree(one, 'test', path, f'{size[0]} x {size[1]} pixels, too narrow')
    else:
        assert one.read('test') is None


# ------------------------------------------------------------------------------------------ masks


def ids(path):
    return np.asarray(Image.open(path))


def colours(path):
    Image.open(path).convert('RGB').save(path)


def outside(path):
    Image.fromarray(np.full_like(ids(path), 9)).save(path)


MASKS = {
    'missing': (lambda p: p.unlink(), 'does not exist'),
    'truncated': (lambda p: p.write_bytes(p.read_bytes()[:60]), 'is truncated or damaged'),
    'other size': (lambda p: Image.new('L', (50, 70), 1).save(p), '50 x 70 pixels, its image'),
    'RGB': (colours, 'is a colour image'),
    '16-bit': (
        lambda p: Image.fromarray(ids(p).astype(np.uint16) + 256).save(p),
        'has class ids up to 26',
    ),
    'outside': (outside, 'has the class id 9, the config has 1 to 6'),
}


@pytest.mark.parametrize('stage', WHERE)
@pytest.mark.parametrize('case', MASKS)
def test_bad_mask(data, stage, case):
    one = data('segmentation')
    path = one.mask(one.images(WHERE[stage])[2])
    damage, words = MASKS[case]
    damage(path)
    agree(one, stage, path, words)


def test_a_bad_mask_in_test_time_augmentation(data):
    one = data('segmentation')
    load, resize, masks, pack = one.cfg.test_dataloader.dataset.pipeline
    several = dict(type='TestTimeAug', transforms=[[resize], [masks], [pack]])
    one.cfg.test_dataloader.dataset.pipeline = [load, several]
    assert one.read('test') is None
    outside(path := one.mask(one.images(1)[2]))
    agree(one, 'test', path, 'has the class id 9')


def labels(data, index):
    """The mask of a test image, as the metric gets it."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = DATASETS.build(data.cfg.test_dataloader.dataset)
        return dataset[index]['data_samples'].gt_sem_seg.data[0].numpy()


def to_palette(path):
    image = Image.fromarray(ids(path))
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)
    assert Image.open(path).mode == 'P'


@pytest.mark.parametrize(
    'damage',
    [lambda p: Image.fromarray(ids(p).astype(np.uint16)).save(p), to_palette],
    ids=['16-bit', 'palette'],
)
def test_other_masks_mean_the_same(data, damage):
    one = data('segmentation')
    path = one.mask(one.images(1)[0])
    wanted = ids(path).astype(int) - 1
    damage(path)
    np.testing.assert_array_equal(labels(one, 0), np.where(wanted < 0, 255, wanted))
    fine(one)


def test_unlabelled_masks(data):
    one = data('segmentation')
    masks = [one.mask(path) for path in one.images(1)]
    for number, path in enumerate(masks, 1):
        Image.fromarray(np.zeros_like(ids(path))).save(path)
        if number == 1:
            agree(one, 'test', path, 'has no labelled pixel', NOTE)
    agree(one, 'test', masks[0].parents[2] / 'images/validation', 'in any mask', SPOILS)


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
@pytest.mark.parametrize('stage', WHERE)
def test_turned_photo(data, task, stage):
    """Its mask or boxes belong to the upright photo; those of the pixels as stored are refused."""
    one = data(task)
    split = WHERE[stage]
    path = next(p for p in one.images(split) if len({*Image.open(p).size}) == 2)
    upright = Image.open(path).convert('RGB')
    path.write_bytes(turned(upright))
    assert Image.open(path).size == upright.size[::-1]
    assert ImageOps.exif_transpose(Image.open(path)).size == upright.size
    agree(one, stage, path, 'turned upright by its EXIF', NOTE)
    if task == 'segmentation':
        file = one.mask(path)
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
    else:
        file = path

        def swap(content):
            (image,) = (i for i in content['images'] if i['file_name'] == path.name)
            image.update(width=image['height'], height=image['width'])

        change(one.lists(split), swap)
    agree(one, stage, file, 'when turned upright by its EXIF data')


# ---------------------------------------------------------------------------------------- folders


def test_class_folders(data):
    one = data('classification')
    for stage, split in WHERE.items():
        root = one.folder / 'imagenet' / ('train', 'val')[split]
        (root / 'zebra').mkdir()
        agree(one, stage, root / 'zebra', 'is no class of the config')
        (root / 'zebra').rmdir()
        (root / 'moon').rename(root / 'mooon')
        agree(one, stage, root / 'moon', 'is missing, a class of the config')
        assert any(p.file == str(root / 'mooon') for p in one.check().problems)
        (root / 'mooon').rename(root / 'moon')
    fine(one)
    for path in (root / 'star').iterdir():
        path.unlink()
    agree(one, 'test', root / 'star', 'holds no images', SPOILS)


def test_class_folders_with_numbers(data):
    """Folders such as n01440764, for classes with other names."""
    one = data('classification')
    for split in ('train', 'val'):
        for number, path in enumerate(sorted((one.folder / 'imagenet' / split).iterdir())):
            path.rename(path.with_name(f'n{number}'))
    fine(one)
    (one.folder / 'imagenet/val/n2').rename(one.folder / 'imagenet/val/n7')
    root = one.folder / 'imagenet/val'
    assert any(p.file == str(root) and 'n3 where' in p.wrong for p in one.check().problems)
    (root / 'n8').mkdir()
    agree(one, 'test', root, 'has 6 class folders, the config 5 classes')


def test_classes_in_another_order_than_the_folders(data):
    one = data('classification')
    for stage in ('train', 'test'):
        meta = one.cfg[f'{stage}_dataloader'].dataset.metainfo
        meta.classes = CLASSES[::-1]
    root = one.folder / 'imagenet'
    for stage, name in (('train', 'train'), ('test', 'val')):
        agree(one, stage, root / name / 'circle', "calls class 0 'triangle'")


def test_lists_of_labels(data):
    one = data('classification')
    root = one.folder / 'imagenet'
    names = [str(p.relative_to(root / 'val')) for p in one.images(1)]
    (file := root / 'meta/val.txt').parent.mkdir()
    lines = [f'{name} {CLASSES.index(name.split("/")[0])}' for name in names]
    file.write_text('\n'.join(lines))
    fine(one)
    for line, words in (
        (f'{names[0]} 5', 'has the label 5 in line 6, but there are 5 classes'),
        (names[0], 'in line 6, no "name 3"'),
    ):
        file.write_text('\n'.join([*lines, line]))
        agree(one, 'test', file, words)
    file.write_text('\n'.join([*lines, 'star/none.JPEG 3']))
    agree(one, 'test', root / 'val/star/none.JPEG', 'does not exist')


def test_files_that_are_no_images(data):
    one = data('classification')
    path = one.images(0)[0].with_name('notes.txt')
    path.write_text('by their name')
    agree(one, 'train', path, 'is no image by its name', NOTE)
    one = data('segmentation')
    extra = one.mask(one.images(0)[0]).with_name('extra.png')
    Image.new('L', (64, 64)).save(extra)
    agree(one, 'train', extra, 'belongs to no image', NOTE)


@pytest.mark.parametrize('task', ['classification', 'segmentation', 'detection', 'hands'])
@pytest.mark.parametrize('stage', WHERE)
def test_empty_folder(data, task, stage):
    one = data(task)
    for path in one.images(WHERE[stage]):
        path.unlink()
    folder = one.folder / dict(zip(WHERE, FOLDERS[task], strict=True))[stage]
    words = dict(
        classification=(folder, 'holds no images'),
        segmentation=(folder, 'gives no images: no file ends in .jpg'),
        detection=(folder / '000000000001.jpg', 'does not exist'),
        hands=(folder, 'lacks 2 of 2 images'),
    )
    file, said = words[task]
    if task == 'hands':  # the data set's own checks
        assert said in one.read(stage)
        assert any(said in p.wrong and p.level == STOPS for p in one.check().problems)
    else:
        agree(one, stage, file, said)


def test_hand_lists_of_another_length(data):
    one = data('hands')
    change(one.folder / 'freihand/evaluation_K.json', lambda values: values[:-1])
    assert 'differ' in one.read('test')
    (found,) = one.check().problems
    assert 'differ' in found.wrong and found.level == STOPS


@pytest.mark.parametrize('task', ['classification', 'hands'])
def test_fewer_images_than_a_batch(data, task):
    one = data(task)
    for stage in WHERE:
        one.cfg[f'{stage}_dataloader'].batch_size = 32
    folder = one.folder / FOLDERS[task][0]
    words = f'gives {len(one.images(0))} images, fewer than a batch of 32'
    said = one.read('train')
    assert words in said and 'batch_size' in said and str(one.folder) in said
    (found,) = one.check().problems
    assert words in found.wrong and str(folder).startswith(found.file.rstrip('/'))
    assert one.read('test') is None
    one.cfg.train_dataloader.drop_last = False
    fine(one)
