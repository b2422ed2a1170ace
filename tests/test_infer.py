"""tools/infer.py: what it writes is what the model says, and nothing is lost or overwritten."""

import io
import json
import re
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import test_tools
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from test_apis import Case
from test_tools import CLASSIFICATION, CONFIGS, DETECTION, SEGMENTATION, refusal

import fastvit_mm
from fastvit_mm import FastViTError, pictures
from fastvit_mm.prediction import open_input

home, tool = test_tools.home, test_tools.tool
tasks = pytest.mark.parametrize(
    'task', CONFIGS, ids=['segmentation', 'detection', 'classification']
)


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    """A model with random weights for each task, and the command that opens it."""
    made = {}

    def case(task):
        if task not in made:
            made[task] = one = Case(task, tmp_path_factory.mktemp('case'))
            one.ready = one.model()
            config = Config.fromfile(one.config)
            config.merge_from_dict(one.options)
            config.dump(one.config.with_name('ready.py'))
            # random weights are sure of nothing
            one.command = (one.config.with_name('ready.py'), one.checkpoint, '--score-thr', 0)
        return made[task]

    return case


def image(seed=0, height=70, width=90):
    """A smooth BGR image, which JPEG and videos hardly change."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def write(path, seed=0, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image(seed, **size))
    return path


def outcome(out, name):
    """The two JSON files, the first through pycocotools where that reads it."""
    found = json.loads((out / f'{name}.predictions.json').read_text())
    coco = COCO(str(out / f'{name}.images.json'))
    if found and 'category_id' in found[0]:
        found = list(coco.loadRes(str(out / f'{name}.predictions.json')).anns.values())
    return coco, found


def agree(case, task, found, picture):
    """The results of one image are what the model says of it."""
    expected = fastvit_mm.inference(case.ready, picture)
    if task == CLASSIFICATION:
        (one,) = found
        best = np.argsort(-expected['pred_scores'])[:5]
        assert one['category_ids'] == (best + 1).tolist()
        assert one['labels'] == [f'kind {label}' for label in best]
        np.testing.assert_allclose(one['scores'], expected['pred_scores'][best], rtol=1e-5)
        return
    masks = [rle.decode(one['segmentation']).astype(bool) for one in found]
    if task == SEGMENTATION:
        field = expected.pred_sem_seg.data[0].numpy()
        assert [one['category_id'] - 1 for one in found] == np.unique(field).tolist()
        for one, mask in zip(found, masks, strict=True):
            assert np.array_equal(mask, field == one['category_id'] - 1)
            assert one['area'] == mask.sum()
        return
    instances = expected.pred_instances.numpy()
    assert len(found) == len(instances) == 5
    boxes = np.array([one['bbox'] for one in found])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, instances.bboxes, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose([one['score'] for one in found], instances.scores, rtol=1e-4)
    assert [one['category_id'] - 1 for one in found] == instances.labels.tolist()
    assert np.array_equal(masks, instances.masks)


@tasks
def test_folder(tool, cases, task, tmp_path):
    """Pictures, JSON and exit code of a folder with an image that cannot be read."""
    case, folder, out = cases(task), tmp_path / 'photos', tmp_path / 'out'
    one, two = write(folder / 'b.png', 1), write(folder / 'a' / 'x.jpg', 2, height=50)
    whole = write(folder / 'broken.jpg', 3).read_bytes()
    (folder / 'broken.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'notes.txt').write_text('not an image')
    narrow = task == SEGMENTATION  # nothing is left of it where the longer side is limited
    if narrow:
        write(folder / 'narrow.png', width=2, height=3000)

    code, err = tool('infer', *case.command, folder, '--out', out, '--json')
    assert code == 1
    assert err.count('broken.jpg: cannot be read') == 1
    assert err.count('narrow.png: 2 x 3000 pixels are too narrow') == narrow
    assert 'notes' not in err and 'images/s' in err
    written = {str(path.relative_to(out)) for path in out.rglob('*') if path.is_file()}
    assert written == {'a/x.jpg', 'b.jpg', 'photos.predictions.json', 'photos.images.json'}
    for path in ('a/x.jpg', 'b.jpg'):
        assert min(cv2.imread(str(out / path)).shape[:2]) > 350, 'too small to read'

    coco, found = outcome(out, 'photos')
    assert [coco.cats[k]['name'] for k in sorted(coco.cats)] == case.names
    assert min(coco.cats) == 1
    files = {known['file_name']: known for known in coco.imgs.values()}
    assert files.keys() == {'a/x.jpg', 'b.png'}
    for path in (one, two):
        known = files[str(path.relative_to(folder))]
        picture = cv2.imread(str(path))
        assert (known['height'], known['width']) == picture.shape[:2]
        agree(case, task, [r for r in found if r['image_id'] == known['id']], picture)


def test_score_threshold_and_deploy_form(tool, cases, tmp_path):
    case = cases(DETECTION)
    scores = fastvit_mm.inference(case.ready, case.path).pred_instances.scores
    middle = float(scores[2])
    args = (*case.command[:2], case.path, '--json', '--reparam', '--score-thr', middle * 0.999)
    assert tool('infer', *args, '--out', tmp_path / 'out')[0] == 0
    _, found = outcome(tmp_path / 'out', 'image')
    np.testing.assert_allclose([one['score'] for one in found], scores[:3], rtol=1e-3)
    # nothing at all is a result too
    args = (*args[:-1], 1, '--out', tmp_path / 'none')
    assert tool('infer', *args)[0] == 0
    assert outcome(tmp_path / 'none', 'image')[1] == []
    assert (tmp_path / 'none' / 'image.jpg').is_file()


def test_standard_input(tool, cases, tmp_path, monkeypatch):
    case = cases(CLASSIFICATION)
    args = ('infer', *case.command, '-', '--out', tmp_path, '--json')
    for content, code in ((case.path.read_bytes(), 0), (b'no image', 1), (b'', 1)):
        monkeypatch.setattr(sys, 'stdin', SimpleNamespace(buffer=io.BytesIO(content)))
        result, err = tool(*args)
        assert result == code
        _, found = outcome(tmp_path, 'stdin')
        if code == 0:
            agree(case, CLASSIFICATION, found, case.image)
            assert (tmp_path / 'stdin.jpg').is_file()
        else:
            assert found == [] and 'stdin: cannot be read' in err


@tasks
def test_video(tool, cases, task, tmp_path):
    case, path = cases(task), tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 12, (96, 64))
    for seed in range(3):
        writer.write(image(seed, 64, 96))
    writer.release()
    out = tmp_path / 'out'
    code, err = tool('infer', *case.command, path, '--out', out, '--json')
    assert code == 0, err

    def frames(path):
        capture = cv2.VideoCapture(str(path))
        assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
        while (read := capture.read())[0]:
            yield read[1]

    originals, drawn = list(frames(path)), list(frames(out / 'clip.mp4'))
    assert len(drawn) == len(originals) == 3
    assert {frame.shape for frame in drawn} == {(64, 96, 3)}
    assert all(np.abs(d - o.astype(int)).mean() > 3 for d, o in zip(drawn, originals, strict=True))
    coco, found = outcome(out, 'clip')
    assert [known['frame_index'] for known in coco.imgs.values()] == [0, 1, 2]
    for known, frame in zip(coco.imgs.values(), originals, strict=True):
        agree(case, task, [r for r in found if r['image_id'] == known['id']], frame)


def test_only_one_thread_asks_a_video(tmp_path):
    """While frames are read ahead, what is known of the file is not asked again."""
    path, out = tmp_path / 'in' / 'a.avi', tmp_path
    path.parent.mkdir()
    film = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 12, (64, 48))
    for _ in range(3):
        film.write(np.zeros((48, 64, 3), np.uint8))
    film.release()
    video = open_input(str(path), out)
    capture, video.capture = video.capture, None
    assert len(video) == 3
    video.write({}, np.zeros((48, 64, 3), np.uint8))
    video.close()
    assert cv2.VideoCapture(str(out / 'a.mp4')).get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    capture.release()


def test_a_video_that_ends_early(tool, cases, tmp_path):
    path = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 12, (96, 64))
    for seed in range(20):
        writer.write(image(seed, 64, 96))
    writer.release()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    case, out = cases(CLASSIFICATION), tmp_path / 'out'
    code, err = tool('infer', *case.command, path, '--out', out, '--json')
    assert code == 1 and 'clip.avi, frame' in err and 'cannot be read' in err
    assert 0 < len(outcome(out, 'clip')[0].imgs) < 20


def test_names_and_orientation(tool, cases, tmp_path):
    """Two images of one stem get two pictures; a photo lies as its EXIF data say."""
    case, folder, out = cases(SEGMENTATION), tmp_path / 'in', tmp_path / 'out'
    write(folder / 'a.png', 1)
    write(folder / 'a.jpg', 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    turned = Image.fromarray(image(3, 50, 100)[..., ::-1])
    turned.save(folder / 'turned.jpg', exif=exif)
    turned.convert('L').save(folder / 'grey.tif')
    turned.convert('RGBA').save(folder / 'alpha.webp')
    code, err = tool('infer', *case.command, folder, '--out', out, '--json')
    assert code == 0, err
    names = {path.name for path in out.glob('*.jpg')}
    assert names == {'a.png.jpg', 'a.jpg.jpg', 'turned.jpg', 'grey.jpg', 'alpha.jpg'}
    coco, found = outcome(out, 'in')
    known = next(one for one in coco.imgs.values() if one['file_name'] == 'turned.jpg')
    assert (known['height'], known['width']) == (100, 50)
    upright = cv2.imread(str(folder / 'turned.jpg'))
    assert upright.shape == (100, 50, 3)
    agree(case, SEGMENTATION, [r for r in found if r['image_id'] == known['id']], upright)


def test_a_picture_larger_than_jpeg(tool, cases, tmp_path):
    write(tmp_path / 'in' / 'long.png', width=65536, height=2)
    write(tmp_path / 'in' / 'one.png')
    case, out = cases(CLASSIFICATION), tmp_path / 'out'
    code, err = tool('infer', *case.command, tmp_path / 'in', '--out', out)
    assert code == 1 and 'long.png: its picture would be larger' in err
    assert [path.name for path in out.glob('*')] == ['one.jpg']


def test_an_interrupted_run_keeps_what_is_done(tool, cases, tmp_path, monkeypatch):
    case, folder, out = cases(CLASSIFICATION), tmp_path / 'in', tmp_path / 'out'
    for seed in range(3):
        write(folder / f'{seed}.png', seed)
    calls, infer = [], fastvit_mm.inference

    def stop_at_third(*args):
        calls.append(1)
        if len(calls) == 2:
            raise FastViTError('this one not')
        if len(calls) == 3:
            raise KeyboardInterrupt
        return infer(*args)

    monkeypatch.setattr(fastvit_mm, 'inference', stop_at_third)
    assert tool('infer', *case.command, folder, '--out', out, '--json')[0] == 130
    monkeypatch.undo()
    coco, found = outcome(out, 'in')
    assert [known['file_name'] for known in coco.imgs.values()] == ['0.png']
    agree(case, CLASSIFICATION, found, image(0))


def test_refusals(tool, cases, tmp_path):
    """Before anything is read or written."""
    case = cases(CLASSIFICATION)
    folder, out = tmp_path / 'in', tmp_path / 'out'
    path, text = write(folder / 'sub' / 'a.png'), folder / 'a.txt'
    text.write_text('hello')
    (tmp_path / 'empty').mkdir()
    before = path.read_bytes()

    def refused(source, *words, where=out, options=(), model=case.command[:2]):
        refusal(tool('infer', *model, source, '--out', where, *options), *words)
        assert not out.exists()

    refused(tmp_path / 'no.png', 'no.png does not exist')
    refused(tmp_path / 'empty', 'no images', 'empty')
    refused(text, 'a.txt is neither an image nor a video')
    for source, where in (
        (folder, folder),
        (folder, folder / 'sub'),
        (folder, folder / 'sub' / 'new'),
        (path, path.parent),
        (path, folder / 'new' / '..' / 'sub'),
    ):
        refused(source, '--out', 'among the originals', where=where)
    for threshold in ('1.5', '-0.1', 'nan'):
        refused(path, '--score-thr', threshold, options=['--score-thr', threshold])
    refused(path, '--device', 'cannot be used', options=['--device', 'meta7'])
    refused(path, 'no.pth', 'does not exist', model=(case.command[0], 'no.pth'))
    refused(path, 'merged', 'leave out', model=(case.command[0], 'm.onnx'), options=['--reparam'])
    (tmp_path / 'file').write_text('')
    refused(path, 'cannot write', where=tmp_path / 'file')
    assert path.read_bytes() == before and len(list(folder.rglob('*'))) == 3


def test_help(capsys, monkeypatch):
    """Every argument and what it is for, in an order that can be typed."""
    monkeypatch.setenv('COLUMNS', '200')
    with pytest.raises(SystemExit) as end:
        test_tools.load_tool('infer').main(['--help'])
    assert end.value.code == 0
    usage, about = capsys.readouterr().out.split('\n\n', 1)
    assert usage.split('--out OUT')[1].endswith('config checkpoint input')
    assert 'tools/infer.py CONFIG CHECKPOINT' in about and 'predictions.json' in about
    options = re.findall(r'--[\w-]+', usage)
    assert {'--out', '--json', '--score-thr', '--device', '--reparam', '--demo'} <= set(options)
    for name in ('config', 'checkpoint', 'input', *options):
        assert re.search(rf'^  {name}( [A-Z_=]+)*( \[.*\])? *(\n +|  )\w', about, re.MULTILINE), (
            name
        )


META = dict(classes=('sky', 'tree', 'car'), palette=[[0, 0, 255], [0, 255, 0], [255, 0, 0]])
GREY = np.full((600, 800, 3), 128, np.uint8)


def segmentation(labels):
    return SegDataSample(pred_sem_seg=PixelData(data=torch.as_tensor(labels)[None]))


def detection(boxes, labels, scores, masks=None):
    found = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
        scores=torch.tensor(scores),
    )
    if masks is not None:
        found.masks = torch.as_tensor(np.array(masks))
    return DetDataSample(pred_instances=found)


def near(picture, rgb, within=12):
    """Where a BGR picture has a colour."""
    return (np.abs(picture.astype(int) - rgb[::-1]) <= within).all(-1)


def test_segmentation_picture():
    labels = np.zeros((600, 800), np.int64)
    labels[:200, :300] = 2
    picture = pictures.draw(GREY, segmentation(labels), META)
    assert picture.shape[0] == 600 and picture.shape[1] > 800
    scene, legend = picture[:, :800], picture[:, 800:]
    tint = 0.4 * 128 + 0.6 * np.array([[0, 0, 255], [255, 0, 0]])  # sky, car
    assert near(scene, tint[1])[:200, :300].mean() > 0.99
    assert near(scene, tint[0])[200:].mean() > 0.99
    # patches of what is there only, the larger class first
    sky, tree, car = (near(legend, np.array(colour)) for colour in META['palette'])
    assert sky.sum() > 100 and car.sum() > 100 and not tree.any()
    assert sky.any(1).nonzero()[0].max() < car.any(1).nonzero()[0].min()


def test_legend():
    labels = np.repeat(np.arange(6), [5, 40, 1, 30, 4, 20])[None]
    rows = pictures.legend(labels, dict(classes=list('abcdef')), limit=6)
    assert [row[0] for row in rows] == list('bdfaec')
    assert [row[1] for row in rows] == [0.4, 0.3, 0.2, 0.05, 0.04, 0.01]
    assert len({row[2] for row in rows}) == 6
    rows = pictures.legend(labels, {}, limit=4)
    assert [row[0] for row in rows] == ['class 1', 'class 3', 'class 5', '3 more']
    assert sum(row[1] for row in rows) == pytest.approx(1)


def test_classification_bars():
    scores = np.array([0.1, 0.6, 0.3], np.float32)
    scene = image(0, 600, 800)
    picture = pictures.draw(scene, dict(pred_scores=scores), META)
    assert np.array_equal(picture[:, :800], scene), 'the image stays as it is'
    side = picture[:, 800:]
    first = near(side, (38, 99, 190)).sum(1).max()
    others = near(side, pictures.BAR).sum(1)
    assert others.max() == pytest.approx(first / 2, abs=3)
    assert others[others > 0].min() == pytest.approx(first / 6, abs=3)
    # the best one on top
    assert near(side, (38, 99, 190)).any(1).nonzero()[0].max() < others.nonzero()[0].min()


def test_detection_picture():
    masks = np.zeros((2, 600, 800), bool)
    masks[0, 100:300, 100:300] = masks[1, 350:550, 500:700] = True
    boxes = [[100, 100, 300, 300], [500, 350, 700, 550]]
    sample = detection(boxes, [2, 1], [0.9, 0.5], masks)
    picture = pictures.draw(GREY, sample, META)
    assert picture.shape == GREY.shape
    tint = 0.55 * 128 + 0.45 * np.array(META['palette'])
    assert near(picture, tint[2])[150:290, 110:290].mean() > 0.9
    assert near(picture, tint[1])[400:540, 510:690].mean() > 0.9
    assert np.array_equal(picture[320:340], GREY[320:340])
    changed = (picture != GREY).any(-1)
    changed[95:305, 95:305] = changed[345:555, 495:705] = False
    assert changed.mean() < 0.01, 'only labels reach out of the boxes'
    # without masks, without names, without anything
    sample = detection(boxes, [2, 1], [0.9, 0.5])
    plain = pictures.draw(GREY, sample, {})
    assert (plain != GREY).any() and (plain[200, 150:280] == 128).all()
    assert np.array_equal(pictures.draw(GREY, detection([], [], []), META), GREY)


@pytest.mark.parametrize('size', [(1, 1), (64, 85), (40, 700), (300, 300), (900, 1200)])
def test_every_size_in_both_ways(size):
    scene = image(0, *size)
    labels = np.arange(size[0] * size[1]).reshape(size) % 200
    names = dict(classes=[f'{"a class of a long name " * 3}{i} $x^' for i in range(200)])
    box = [[0, 0, size[1] * 0.7, size[0] * 0.7]]
    for result in (
        segmentation(labels),
        dict(pred_scores=np.linspace(0, 1, 200)),
        detection(box, [150], [0.7], [labels % 2 == 0]),
    ):
        kept = scene.copy()
        assert pictures.draw(scene, result, names, same_size=True).shape == scene.shape
        picture = pictures.draw(scene, result, names)
        assert np.prod(picture.shape[:2]) >= 500**2
        assert picture.dtype == np.uint8
        assert np.array_equal(scene, kept)
