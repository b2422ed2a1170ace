"""Reading: exported files that answer in place of a model."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torchvision  # noqa: F401  (its operators are in exported detectors)
from torch import Tensor

from fastvit_mm.errors import FastViTError, one_line, require

from .formats import KEY
from .graphs import kind_of, normalization

#: Files that this machine can run.
SUFFIXES = ('.onnx', '.pt2', '.xml')


def onnx_session(path: Path, device: torch.device):
    runtime = require(path.name, 'onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=providers(runtime, device))
    name = session.get_inputs()[0].name
    info = session.get_modelmeta().custom_metadata_map.get(KEY)
    return info, lambda image: session.run(None, {name: image})


def providers(runtime, device: torch.device) -> list:
    """What ONNX Runtime computes with, the first choice first; in float32 wherever."""
    found = ['CPUExecutionProvider']  # no other one: they may compute in less
    if device.type == 'cuda' and 'CUDAExecutionProvider' in runtime.get_available_providers():
        found.insert(0, ('CUDAExecutionProvider', dict(device_id=device.index or 0, use_tf32=0)))
    return found


def torch_session(path: Path, device: torch.device):
    extra = {KEY: ''}
    module = torch.export.load(path, extra_files=extra).module()
    return extra[KEY], lambda image: [t.numpy() for t in module(torch.from_numpy(image))]


@cache
def openvino_core():
    """The only one of a process: after two of them have ended in the order in which they began, the
    next signal kills the process (OpenVINO 2026.4 leaves its stack for signals unmapped)."""
    import openvino

    return openvino.Core()


def openvino_session(path: Path, device: torch.device):
    require(path.name, 'openvino')
    core = openvino_core()
    model = core.read_model(path)
    info = model.get_rt_info(KEY).value if model.has_rt_info(KEY) else None
    # Some processors would else compute in bfloat16 what was exported in float32.
    hints = {'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = core.compile_model(model, 'CPU', hints)
    return info, lambda image: list(compiled(image).values())


SESSIONS = dict(zip(SUFFIXES, (onnx_session, torch_session, openvino_session), strict=True))


def is_exported(path: str | Path | None) -> bool:
    """Whether a checkpoint's name is that of an exported file."""
    return path is not None and Path(path).suffix in SUFFIXES


class Session:
    """An exported file, ready to run.

    Args:
        device: where an ONNX file runs, if ONNX Runtime can; all others run on the CPU.

    Attributes:
        info: what the file says of itself (see :func:`fastvit_mm.export.export`).

    Raises:
        FastViTError: a file that does not exist, cannot be read, or is not ours; a runtime that is
            not installed.
    """

    def __init__(self, path: str | Path, device: str | torch.device = 'cpu'):
        self.path = Path(path)
        if not is_exported(path):
            raise FastViTError(f'{path}: only {", ".join(SUFFIXES)} files can be run here')
        if not self.path.exists():
            raise FastViTError(f'{path} does not exist')
        try:
            info, self.call = SESSIONS[self.path.suffix](self.path, torch.device(device))
        except FastViTError:
            raise
        except Exception as error:
            raise FastViTError(f'{path} cannot be read: {one_line(error)}') from error
        if not info:
            raise FastViTError(
                f'{path} was not written by tools/export.py: its metadata are missing'
            )
        self.info = json.loads(info)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs by name, of any number of images.

        Args:
            image: as the file takes it: float32 (B, 3, H, W) or, with ``preprocess``, uint8
                (B, H, W, 3).

        Raises:
            FastViTError: images of another size than the file's.
        """
        size = list(image.shape[1:3] if self.info['preprocess'] else image.shape[2:])
        if self.info['size'] not in (None, size):
            height, width = self.info['size']
            raise FastViTError(
                f'{self.path.name} takes images of {height} x {width} pixels, not of {size[0]} x '
                f'{size[1]}: export with --dynamic, or with this --size'
            )
        batch = self.info['batch'] or len(image)
        parts = []
        for chunk in image.split(batch):
            missing = batch - len(chunk)
            full = torch.cat([chunk, *[chunk[-1:]] * missing]).contiguous().numpy()
            outputs = [torch.from_numpy(np.asarray(t)) for t in self.call(full)]
            # a detector's outputs have no batch
            parts.append([t[: len(chunk)] for t in outputs] if missing else outputs)
        return dict(
            zip(self.info['outputs'], (torch.cat(p) for p in zip(*parts, strict=True)), strict=True)
        )


def attach(model: nn.Module, path: str | Path, averaged: bool = False) -> nn.Module:
    """Let an exported file answer in place of a model's layers, in place.

    What comes before and after stays the package's own: normalizing, windows, resizing to the
    original, metrics. An ONNX file runs on the model's device, if ONNX Runtime can.

    Args:
        averaged: whether several predictions for an image will be averaged.

    Raises:
        FastViTError: as :class:`Session`; a file of another task or with other classes, or whose
            predictions cannot be averaged; a model of which no file can be made.
    """
    session = Session(path, next(model.parameters()).device)
    task, wanted = session.info['task'], kind_of(model).task()
    if task != wanted:
        raise FastViTError(f'{path} is a {task}, the config has a {wanted}')
    if averaged and task == 'segmentor' and 'logits' not in session.info['outputs']:
        raise FastViTError(
            f'{path} gives labels, which --tta cannot average: export with --output logits'
        )
    classes, wanted = session.info['classes'], NUM_CLASSES[task](model)
    if classes and len(classes) != wanted:
        raise FastViTError(
            f'{path} knows {len(classes)} classes, the config {wanted}: give the config that '
            'the file was exported with'
        )

    def run(images: Tensor) -> dict[str, Tensor]:
        device, images = images.device, images.cpu()
        if session.info['preprocess']:
            mean, std = (t.cpu() for t in normalization(model))
            images = (images * std + mean).round().clamp(0, 255).to(torch.uint8)
            images = images.permute(0, 2, 3, 1)
        return {name: out.to(device) for name, out in session(images).items()}

    ATTACH[task](model, run)
    if classes:
        meta = dict(getattr(model, 'dataset_meta', None) or {}, classes=tuple(classes))
        model.dataset_meta = model._dataset_meta = meta
    return model


def attach_classifier(model, run):
    def logits(images):
        out = run(images)
        return out['logits'] if 'logits' in out else out['probabilities'].clamp(min=1e-30).log()

    model.backbone, model.neck = nn.Identity(), None
    model.extract_feat = lambda images, *args, **kwargs: images
    model.head.forward = logits


def attach_embedder(model, run):
    model.backbone, model.neck = nn.Identity(), None
    model.extract_feat = lambda images, *args, **kwargs: images
    model.head.forward = lambda images: run(images)['embeddings']


def attach_segmentor(model, run):
    def logits(images, metas):
        out = run(images)
        if 'logits' in out:
            return out['logits']
        return nn.functional.one_hot(out['labels'], model.num_classes).movedim(-1, 1).float()

    model.backbone, model.neck = nn.Identity(), None
    model.encode_decode = logits


def attach_detector(model, run):
    from mmengine.structures import InstanceData

    head = getattr(model.roi_head, 'mask_head', None)
    if head is not None:
        head.class_agnostic = True  # the file gives the mask of the box's own class

    def predict(images, samples, rescale=True):
        results = []
        for image, sample in zip(images, samples, strict=True):
            height, width = sample.img_shape[:2]
            out = run(image[None, :, :height, :width])
            found = InstanceData(
                bboxes=out['boxes'], scores=out['scores'], labels=out['labels'].long()
            )
            if head is not None:
                crops = (out['mask_crops'].clamp(1e-7, 1 - 1e-7).logit()[:, None],)
                cfg = model.test_cfg.rcnn
                found = head.predict_by_feat(crops, [found], [sample.metainfo], cfg, rescale)[0]
            elif rescale:
                found.bboxes /= found.bboxes.new_tensor(sample.scale_factor).repeat(2)
            results.append(found)
        return model.add_pred_to_datasample(samples, results)

    model.backbone, model.neck = nn.Identity(), None
    model.predict = predict


ATTACH = dict(
    classifier=attach_classifier,
    embedder=attach_embedder,
    segmentor=attach_segmentor,
    detector=attach_detector,
)
NUM_CLASSES = dict(
    classifier=lambda model: model.head.num_classes,
    embedder=lambda model: 0,
    segmentor=lambda model: model.num_classes,
    detector=lambda model: model.roi_head.bbox_head.num_classes,
)
