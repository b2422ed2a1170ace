"""The proof that an exported file computes what its model computes."""

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import ConfigDict
from torch import Tensor

from fastvit_mm.errors import require
from fastvit_mm.reparameterize import distance

from .formats import FORMATS, KEY, merge
from .graphs import Graph, graph_of, normalization, paste
from .runtime import Session

#: No rounding explains more: relative difference, or share of pixels.
LIMIT = 0.05


@dataclass
class Limits:
    """What mmdet's own prediction and an exported detector may differ by.

    Rounding moves a box a little and the probabilities of its mask with it. Where they are near the
    threshold it decides: a whole row of pixels, if the edge of a box falls on their centres. Pixels
    within ``margin`` of the threshold do not count, nor do ``rim`` more.
    """

    box: float = 0.5  # pixels
    score: float = 1e-3
    mask: float = 0.99  # overlap
    crop: float = 0.02  # of probabilities, on average over what a crop covers
    margin: float = 0.05  # of probabilities
    rim: int = 0  # pixels
    lost: float = 0.0  # share without a counterpart


#: For float16 features, which may also decide whether one box suppresses another.
HALF_LIMITS = Limits(score=2e-2, mask=0.95, crop=0.1, rim=2, lost=0.05)


@dataclass
class Verdict:
    """What a comparison found.

    Attributes:
        explained: rounding explains all differences.
        text: the figures, for people.
    """

    explained: bool
    text: str


class Output:
    """One output of an exported file, held against the model's, image by image."""

    def __init__(self, name: str):
        self.name = name
        self.worst = self.rounding = 0.0
        self.least = torch.finfo(torch.float32).eps
        self.what = 'largest relative difference'

    def compare(self, got: Tensor, wanted: Tensor, same: Tensor, truth: Tensor) -> None:
        """``got`` (B, ...), the file's; of one image (1, ...): ``wanted``, the model's, and with
        the file's rounding and with none ``same`` and ``truth``."""
        self.worst = max(self.worst, *(difference(one[None], wanted) for one in got))
        self.rounding = max(self.rounding, difference(same, truth))
        if not wanted.is_floating_point():
            self.least, self.what = 1 / wanted.numel(), 'share of differing pixels'

    @property
    def limit(self) -> float:
        return min(10 * max(self.rounding, self.least), LIMIT)

    def __str__(self) -> str:
        return f'{self.what} {self.worst:.1e} (rounding explains {self.limit:.1e})'


@torch.no_grad()
def verify(model: nn.Module, path: str | Path, images: Iterable[np.ndarray]) -> Verdict:
    """Run an exported file and the model that it came from on images.

    Every output is compared. Floating-point numbers: largest difference over the largest value,
    against ten times what the model's own float32 (for a half-precision file: its half precision)
    differs from its float64. Labels: the share of pixels that differ, against ten times the same.
    Detections: against the model's own ``predict``, each with its counterpart. A Core ML file runs
    on Apple's devices alone: its operators are counted and its weights compared instead.

    Args:
        model: what was given to :func:`fastvit_mm.export.export`.
        images: uint8 RGB, (H, W, 3), of the file's size.
    """
    path, model = Path(path), copy.deepcopy(model).cpu()
    if path.suffix == FORMATS['coreml'].suffix:
        return verify_coreml(model, path)
    session = Session(path)
    info = session.info
    if info['task'] == 'detector':
        cfg, limits = model.test_cfg.rcnn, HALF_LIMITS if info['half'] else Limits()
        # so that mmdet gives the probabilities of masks
        model.roi_head.test_cfg = ConfigDict(cfg, mask_thr_binary=-1)
        pairs = [detections(model, session, image) for image in images]
        return compare_detections(pairs, cfg, limits)
    names = info['outputs']
    reference = graph_of(copy.deepcopy(model), output=names[0]).eval()
    if names != list(reference.names):
        return Verdict(
            False, f'it gives {", ".join(names)} instead of {", ".join(reference.names)}'
        )
    outputs = [Output(name) for name in names]
    exact = copy.deepcopy(reference).double()
    reduced = None
    if info['half']:
        dtype = torch.bfloat16 if path.suffix == '.pt2' else torch.float16
        reduced = graph_of(merge(model), half=dtype, output=names[0]).eval()
    for image in images:
        normalized = normalize(model, image)
        given = torch.from_numpy(image)[None] if info['preprocess'] else normalized
        got = session(given.repeat(info['batch'] or 1, 1, 1, 1))
        wanted, truth = reference(normalized), exact(normalized.double())
        same = wanted if reduced is None else reduced(normalized)
        for output, *values in zip(outputs, wanted, same, truth, strict=True):
            output.compare(got[output.name], *values)
    if len(outputs) == 1:
        text = str(outputs[0])
    else:
        text = '; '.join(f'{output.name}: {output}' for output in outputs)
    return Verdict(all(output.worst <= output.limit for output in outputs), text)


def difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return np.inf
    return distance(a, b) if a.is_floating_point() else float((a != b).float().mean())


def normalize(model: nn.Module, image: np.ndarray) -> Tensor:
    """(1, 3, H, W) as the model wants it."""
    mean, std = normalization(model)
    return ((torch.from_numpy(image).permute(2, 0, 1).float() - mean) / std)[None]


def detections(model: nn.Module, session: Session, image: np.ndarray) -> tuple[dict, dict]:
    """What mmdet predicts for an image of its own size, and what the file gives.

    mmdet's ``masks`` are probabilities, in 255ths.
    """
    from mmdet.structures import DetDataSample

    height, width = image.shape[:2]
    meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
    sample = DetDataSample(metainfo=meta)
    bgr = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)
    found = model.test_step(dict(inputs=[bgr], data_samples=[sample]))[0].pred_instances
    wanted = dict(boxes=found.bboxes, scores=found.scores, labels=found.labels)
    if 'masks' in found:
        wanted['masks'] = torch.as_tensor(found.masks)
    given = torch.from_numpy(image)[None]
    return wanted, session(given if session.info['preprocess'] else normalize(model, image))


def compare_detections(pairs: list[tuple[dict, dict]], cfg: dict, limits: Limits) -> Verdict:
    count = lost = 0
    box = score = crop = 0.0
    mask = 1.0
    for wanted, got in pairs:
        rows, columns = match(wanted, got, limits)
        count += len(rows)
        lost += missed(wanted, rows, cfg, limits) + missed(got, columns, cfg, limits)
        if len(rows):
            box = max(box, float((wanted['boxes'][rows] - got['boxes'][columns]).abs().max()))
            score = max(score, float((wanted['scores'][rows] - got['scores'][columns]).abs().max()))
        if 'masks' in wanted:
            masks = wanted['masks'][rows], got['masks'][columns]
            mask = min([mask, *overlaps(*masks, cfg.mask_thr_binary, limits)])
            crop = max([crop, *crop_gaps(wanted, got, rows, columns)])
    if not count + lost:
        return Verdict(
            False,
            'nothing was detected and so nothing compared: export with --cfg-options '
            'model.test_cfg.rcnn.score_thr=0 to see',
        )
    text = (
        f'{count} detections matched, {lost} not; boxes within {box:.1e} pixel, scores within '
        f'{score:.1e}, masks overlap at least {mask:.4f}, their crops within {crop:.1e}'
    )
    explained = (
        score <= limits.score
        and mask >= limits.mask
        and crop <= limits.crop
        and lost <= limits.lost * count
    )
    return Verdict(explained, text)


def crop_gaps(wanted: dict, got: dict, rows: np.ndarray, columns: np.ndarray) -> list[float]:
    """Of pairs of detections: the mean difference between mmdet's probabilities, in 255ths, and
    the file's crops where these are stretched to their boxes."""
    stretched = paste(got['mask_crops'][columns], got['boxes'][columns], got['masks'].shape[1:])
    theirs = wanted['masks'][rows] / 255
    inside = ((stretched > 0) | (theirs > 0)).sum((1, 2)).clamp(min=1)
    return ((stretched - theirs).abs().sum((1, 2)) / inside).tolist()


def overlaps(wanted: Tensor, got: Tensor, threshold: float, limits: Limits) -> list[float]:
    """Of masks (N, H, W) that differ: probabilities in 255ths, and what was made of others."""
    wanted, got = (wanted.flatten(1).float() + 0.5) / 255, got.flatten(1)
    sure = (wanted - threshold).abs() > limits.margin
    a, b = (wanted >= threshold) & sure, got & sure
    differ = (a ^ b).sum(1) > limits.rim
    return ((a & b).sum(1)[differ] / (a | b).sum(1)[differ]).tolist()


def match(wanted: dict, got: dict, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs of one class whose boxes and scores are within the limits, nearest first (an
    optimal assignment)."""
    from scipy.optimize import linear_sum_assignment

    gap = torch.cdist(wanted['boxes'].double(), got['boxes'].double(), p=torch.inf)
    gap += (wanted['scores'][:, None] - got['scores'][None]).abs()  # twins differ by their score
    other = wanted['labels'][:, None] != got['labels'][None]
    gap = gap.masked_fill(other, 1e6).nan_to_num(nan=1e6)
    rows, columns = linear_sum_assignment(gap)
    near = (gap[rows, columns] <= limits.box + limits.score).numpy()
    return rows[near], columns[near]


def missed(found: dict, matched: np.ndarray, cfg: dict, limits: Limits) -> int:
    """How many have no counterpart, but for those that rounding puts on or off the list."""
    scores = found['scores']
    full = len(scores) == cfg.max_per_img
    edge = scores.min() if full else cfg.score_thr
    alone = np.setdiff1d(np.arange(len(scores)), matched)
    return int((~(scores[alone] <= edge + limits.score)).sum())


def verify_coreml(model: nn.Module, path: Path) -> Verdict:
    """Hold a Core ML file's operators and weights against the reparameterized model's."""
    coremltools = require(path.name, 'coremltools')
    package = coremltools.models.MLModel(str(path), skip_model_load=True)
    info = json.loads(package.user_defined_metadata[KEY])
    graph = graph_of(merge(model), info['preprocess'], output=info['outputs'][0])
    spec = package.get_spec()
    found, wanted = operators(spec), expected_operators(graph)
    eps = torch.finfo(torch.float16 if info['half'] else torch.float32).eps
    stored = coremltools.optimize.coreml.get_weights_metadata(package, weight_threshold=0)
    stored = {
        name.removesuffix('_to_fp16'): torch.from_numpy(np.array(w.val))
        for name, w in stored.items()
    }
    names = [output.name for output in spec.description.output]
    # Core ML's own classifiers have names of their own
    named = spec.description.predictedFeatureName or names == list(graph.names)
    worst, missing = 0.0, []
    for name, weight in graph.model.named_parameters():
        twin = stored.get('p_model_' + name.replace('.', '_'))
        if twin is None or twin.numel() != weight.numel():
            missing.append(name)
            continue
        worst = max(worst, distance(twin.float().flatten(), weight.detach().flatten()))
    text = (
        f'{sum(found.values())} operators as expected'
        if found == wanted
        else f'operators {dict(found)} instead of {dict(wanted)}'
    )
    if not named:
        text += f', it gives {", ".join(names)} instead of {", ".join(graph.names)}'
    if missing:
        text += f', {len(missing)} weights are missing, such as {missing[0]}'
    text += f'; weights within {worst:.1e} (it runs on Apple devices only)'
    return Verdict(bool(named) and found == wanted and not missing and worst <= eps, text)


#: Operators that must be there as often as in PyTorch, and what makes them.
COUNTED = {
    'conv': (nn.Conv2d,),
    'gelu': (nn.GELU,),
    'relu': (nn.ReLU,),
    'sigmoid': (nn.Sigmoid,),
}


def operators(spec) -> Counter:
    block = next(iter(spec.mlProgram.functions['main'].block_specializations.values()))
    return Counter(o.type for o in block.operations if o.type in COUNTED)


def expected_operators(graph: Graph) -> Counter:
    """How often one forward pass calls each kind of module."""
    calls = Counter()
    handles = [
        module.register_forward_hook(
            # with `gelu` a convolution of the deploy form computes what follows it, too
            lambda m, _, kwargs, out, kind=kind: calls.update([kind, *COUNTED.keys() & kwargs]),
            with_kwargs=True,
        )
        for module in graph.modules()
        for kind, classes in COUNTED.items()
        if isinstance(module, classes)
    ]
    with torch.no_grad():
        graph.outputs(torch.zeros(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    return calls


def move_aside(path: Path) -> Path:
    """Rename a file that must not be used, and the weights that OpenVINO saves next to it."""
    aside = path.with_name(f'{path.stem}.failed{path.suffix}')
    if aside.is_dir():
        shutil.rmtree(aside)
    path.replace(aside)
    if (weights := path.with_suffix('.bin')).exists() and path.suffix == '.xml':
        weights.replace(aside.with_suffix('.bin'))
    return aside
