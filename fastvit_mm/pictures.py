"""Pictures of predictions, for every task, drawn by the packages' own visualizers."""

import math
import textwrap
import warnings
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.structures import InstanceData

SMALL = 512  # pixels: an image smaller than a square of this side is enlarged to its area
LONG = 4000  # pixels: an image this long is not enlarged, however narrow it is
DPI = 130  # of a small picture; larger ones have larger text
LARGE = 800  # pixels, side of a square: from here on the text grows with the picture
TOP = 5  # classes shown for a classification
IGNORED = 255  # label of pixels that do not count, unless told otherwise


def draw(image: np.ndarray, result, meta: dict, same_size: bool = False) -> np.ndarray:
    """Draw a prediction of :func:`fastvit_mm.inference`.

    Args:
        image: BGR uint8 (H, W, 3).
        result: what ``inference`` returned for it; all detections in it are drawn.
        meta: the model's ``dataset_meta``; without ``classes`` and ``palette``, classes are
            numbered and have random colours.
        same_size: keep the size, for videos, and put bars or legend on top of the image.
            Otherwise they are put next to it, and a small image is enlarged.

    Returns:
        BGR uint8; (H, W, 3) with ``same_size``.
    """
    if 'pred_verts' in result:
        from .hand_mesh.drawing import draw_hand

        return draw_hand(image, result, same_size)
    height, width = image.shape[:2]
    side = math.sqrt(height * width)
    factor = math.ceil(SMALL / side) if side < SMALL and max(height, width) < LONG else 1
    dpi = resolution(side * factor)
    rgb = enlarged(np.ascontiguousarray(image[..., ::-1]), factor, cv2.INTER_CUBIC)
    if isinstance(result, dict):
        picture = add(rgb, panel(top_classes(result, meta), dpi, bars=True), same_size)
    elif 'pred_instances' in result:
        picture = instances(rgb, result.pred_instances.cpu(), meta, factor, dpi)
    else:
        if 'pred_sem_seg' in result:
            labels = result.pred_sem_seg.data[0].cpu().numpy()
        else:  # the truth
            labels, meta = with_unlabelled(result.gt_sem_seg.data[0].cpu().numpy(), meta)
        picture = overlay(rgb, labels, meta, factor)
        rows = legend(labels, meta, limit=max(4, int(rgb.shape[0] / dpi / LEGEND_ROW) - 1))
        picture = add(picture, panel(rows, dpi, bars=False), same_size)
    if same_size and factor > 1:
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(picture[..., ::-1])


def resolution(side: float) -> float:
    """Dots per inch of the text on a picture with the area of a square of this side."""
    return DPI * max(1, side / LARGE)


def compare(image: np.ndarray, truth, result, meta: dict, caption: str) -> np.ndarray:
    """Truth and prediction side by side, with a line of text above.

    Args:
        image: BGR uint8 (H, W, 3).
        truth: of the same kind as ``result``, see :mod:`fastvit_mm.truth`; the name of a
            class; None if it is not known.
        result: see :func:`draw`.

    Returns:
        BGR uint8.
    """
    if truth is None or isinstance(truth, str):
        title = truth and f'truth: {truth};  prediction: {top_classes(result, meta)[0][0]}'
        parts = {title: draw(image, result, meta)}
    else:
        parts = dict(truth=draw(image, truth, meta), prediction=draw(image, result, meta))
    dpi = max(resolution(min(part.shape[:2])) for part in parts.values())
    drawn = [titled(part, title, dpi) for title, part in parts.items()]
    height = max(map(len, drawn))
    gap = np.full((height, round(0.1 * dpi), 3), 255, np.uint8)
    row = [part for one in drawn for part in (padded(one, height), gap)]
    return titled(np.hstack(row[:-1]), caption, dpi, bold=True)


def padded(image: np.ndarray, height: int) -> np.ndarray:
    """An image with white below, ``height`` pixels in total."""
    return np.pad(image, ((0, height - len(image)), (0, 0), (0, 0)), constant_values=255)


def titled(image: np.ndarray, text: str | None, dpi: float, bold: bool = False) -> np.ndarray:
    """An image with text above, in as many lines as it takes; without ``text``, as it is."""
    if not text:
        return image
    width = image.shape[1]
    size = 10.5 if bold else 9.5
    letters = max(8, int((width / dpi - 2 * MARGIN) * 72 / (size * (0.68 if bold else 0.62))))
    lines = textwrap.wrap(text, letters) or ['']
    rows = round((0.19 * len(lines) + 0.11) * dpi)
    figure = Figure((width / dpi, rows / dpi), dpi=dpi, facecolor='white')
    canvas = FigureCanvasAgg(figure)
    weight = 'bold' if bold else 'normal'
    where = dict(x=MARGIN * dpi / width, y=1 - 0.06 * dpi / rows, va='top', linespacing=1.25)
    figure.text(s='\n'.join(lines), fontsize=size, fontweight=weight, parse_math=False, **where)
    canvas.draw()
    strip = np.asarray(canvas.buffer_rgba())[:, :width, :3]
    return np.vstack([strip, image])


def class_name(meta: dict, label: int) -> str:
    """The name of a class, or its number if the model has no names."""
    classes = meta.get('classes') or ()
    return str(classes[label]) if label < len(classes) else f'class {label}'


def colours(meta: dict, count: int) -> list[tuple[int, int, int]]:
    """An RGB colour, 0 to 255, for each of ``count`` classes."""
    from mmdet.visualization import get_palette

    palette = meta.get('palette')
    if palette is not None and not isinstance(palette, str):
        palette = [tuple(int(value) for value in colour) for colour in palette]
        if len(palette) < count:
            palette = None
    return [tuple(int(value) for value in colour) for colour in get_palette(palette, count)]


def with_unlabelled(labels: np.ndarray, meta: dict) -> tuple[np.ndarray, dict]:
    """Labels (H, W) with a black class where they are ``ignore_index``, and ``meta`` with it."""
    number = len(meta.get('classes') or ())
    unlabelled = labels == meta.get('ignore_index', IGNORED)
    if not number or not unlabelled.any():
        return labels, meta
    palette = [*colours(meta, number), (0, 0, 0)]
    meta = dict(meta, classes=[*meta['classes'], 'not labelled'], palette=palette)
    return np.where(unlabelled, number, labels), meta


def enlarged(array: np.ndarray, factor: int, how: int) -> np.ndarray:
    return cv2.resize(array, None, fx=factor, fy=factor, interpolation=how) if factor > 1 else array


def instances(
    image: np.ndarray, found: InstanceData, meta: dict, factor: int, dpi: float
) -> np.ndarray:
    """Boxes, masks, names and scores, if there are any, on an enlarged image, by mmdet's
    visualizer."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import bitmap_to_polygon
    from mmdet.visualization import DetLocalVisualizer

    if not len(found):
        return image
    if 'scores' in found:
        found = found[found.scores.argsort()]  # the highest score on top
    found = found.numpy()
    labels = found.labels.tolist()
    palette = colours(meta, max(labels) + 1)
    with matplotlib.rc_context({'figure.dpi': dpi}):
        visualizer = DetLocalVisualizer(line_width=2, text_color=(255, 255, 255))
    visualizer.dataset_meta = dict(
        classes=[class_name(meta, label) for label in range(max(labels) + 1)], palette=palette
    )
    with warnings.catch_warnings():
        # It warns about every box and label that touches the border.
        warnings.simplefilter('ignore', UserWarning)
        if 'masks' in found:
            masks = [
                enlarged(mask.astype(np.float32), factor, cv2.INTER_LINEAR) >= 0.5
                for mask in found.masks
            ]
            visualizer.set_image(image)
            visualizer.draw_binary_masks(
                np.stack(masks), [palette[label] for label in labels], 0.45
            )
            outlines = [line for mask in masks for line in bitmap_to_polygon(mask)[0]]
            if outlines:
                visualizer.draw_polygons(outlines, edge_colors='w', line_widths=1, alpha=0.8)
            image = visualizer.get_image()
        boxes = InstanceData(bboxes=found.bboxes * factor, labels=found.labels)
        if true := 'scores' not in found:
            sample = DetDataSample(gt_instances=boxes)
        else:
            boxes.scores = found.scores
            sample = DetDataSample(pred_instances=boxes)
        which = dict(draw_gt=true, draw_pred=not true)
        visualizer.add_datasample('', image, sample, pred_score_thr=-1, **which)
    return visualizer.get_image()


def overlay(image: np.ndarray, labels: np.ndarray, meta: dict, factor: int) -> np.ndarray:
    """Classes as colours on an enlarged image, by mmseg's visualizer.

    Args:
        labels: (H, W) of the original image.
    """
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    from mmseg.visualization import SegLocalVisualizer

    count = max(int(labels.max()) + 1, len(meta.get('classes') or ()))
    visualizer = SegLocalVisualizer(alpha=0.6)
    visualizer.dataset_meta = dict(  # it mixes up its own arguments for these
        classes=[class_name(meta, label) for label in range(count)], palette=colours(meta, count)
    )
    if factor > 1:  # with smooth borders
        present = np.unique(labels)
        parts = [(labels == label).astype(np.float32) for label in present]
        labels = present[np.argmax([enlarged(p, factor, cv2.INTER_LINEAR) for p in parts], axis=0)]
    field = PixelData(data=torch.from_numpy(labels.astype(np.int64))[None])
    # On grey, because a class's colour mixes with the object's.
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    sample = SegDataSample(pred_sem_seg=field)
    visualizer.add_datasample('', grey, sample, draw_gt=False, with_labels=False)
    return visualizer.get_image()


Row = tuple[str, float, tuple[int, int, int]]  # name, share of one, RGB colour


def top_classes(result: dict, meta: dict) -> list[Row]:
    """The most likely classes of an image, the first one in the strongest colour."""
    scores = result['pred_scores']
    return [
        (class_name(meta, label), float(scores[label]), (38, 99, 190) if rank == 0 else BAR)
        for rank, label in enumerate(likeliest(result))
    ]


def likeliest(result: dict) -> list[int]:
    """Labels of the most likely classes, best first."""
    return np.argsort(-np.asarray(result['pred_scores']), kind='stable')[:TOP].tolist()


def legend(labels: np.ndarray, meta: dict, limit: int) -> list[Row]:
    """The classes present, by area; if not all fit, the smallest ones share one row."""
    present, sizes = np.unique(labels, return_counts=True)
    order = np.argsort(-sizes, kind='stable')
    palette = colours(meta, int(present.max()) + 1)
    rows = [
        (class_name(meta, label), size / labels.size, palette[label])
        for label, size in zip(present[order].tolist(), sizes[order].tolist(), strict=True)
    ]
    if len(rows) > limit:
        rest = rows[limit - 1 :]
        more = (f'{len(rest)} more', sum(share for _, share, _ in rest), (255, 255, 255))
        rows = [*rows[: limit - 1], more]
    return rows


WIDTH, MARGIN = 2.5, 0.14  # inches, of a panel
BARS_ROW, LEGEND_ROW = 0.46, 0.27  # inches
NAME = 24  # letters that fit next to the number
BAR, GROUND = (142, 178, 226), (232, 235, 240)


def panel(rows: Sequence[Row], dpi: float, bars: bool) -> np.ndarray:
    """Names and shares, each with a bar below or a colour patch in front: RGB uint8."""
    step = BARS_ROW if bars else LEGEND_ROW
    size = (WIDTH, step * len(rows) + 1.3 * MARGIN)
    figure = Figure(size, dpi=dpi, facecolor='white')
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
    axis.set_axis_off()

    def block(x, y, width, height, colour):
        axis.add_patch(Rectangle((x, y), width, height, color=np.array(colour) / 255, lw=0))

    inner = WIDTH - 2 * MARGIN
    for index, (name, share, colour) in enumerate(rows):
        middle = MARGIN / 2 + step * index + LEGEND_ROW / 2
        left = MARGIN if bars else MARGIN + 0.24
        limit = NAME if bars else NAME - 3
        name = name if len(name) <= limit else f'{name[: limit - 1].rstrip()}…'
        text = dict(va='center_baseline', fontsize=9.5, parse_math=False)
        axis.text(left, middle, name, **text)
        number = f'{share:.1%}' if share >= 5e-4 else '<0.1%'
        axis.text(WIDTH - MARGIN, middle, number, ha='right', **text)
        if bars:
            block(MARGIN, middle + 0.13, inner, 0.1, GROUND)
            block(MARGIN, middle + 0.13, inner * share, 0.1, colour)
        else:
            block(MARGIN, middle - 0.075, 0.15, 0.15, colour)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def add(image: np.ndarray, side: np.ndarray, same_size: bool) -> np.ndarray:
    """A panel to the right of an image, or half-transparent in its upper left corner."""
    if not same_size:
        height = max(len(image), len(side))
        return np.hstack([centred(part, height) for part in (image, side)])
    fit = min(1, 0.6 * image.shape[1] / side.shape[1], image.shape[0] / side.shape[0])
    if fit < 1:
        side = cv2.resize(side, None, fx=fit, fy=fit, interpolation=cv2.INTER_AREA)
    height, width = side.shape[:2]
    image = image.copy()
    corner = image[:height, :width]
    image[:height, :width] = cv2.addWeighted(corner, 0.25, side, 0.75, 0)
    return image


def centred(image: np.ndarray, height: int) -> np.ndarray:
    """An image with white above and below, ``height`` pixels in total."""
    above = (height - len(image)) // 2
    below = height - len(image) - above
    return np.pad(image, ((above, below), (0, 0), (0, 0)), constant_values=255)
