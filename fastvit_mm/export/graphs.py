"""What gets exported: models as plain functions from one image tensor to tensors.

OpenMMLab's models take data samples and branch on what they find; an exported graph cannot. Each
class here runs the parts of such a model with tensors alone and names its outputs.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor
from torchvision.ops import nms, roi_align

from fastvit_mm.errors import FastViTError

#: Score of what fills up a list; no logit is as low.
NEVER = -1e30


class Graph(nn.Module):
    """A model's way from image to outputs.

    Takes ``image``: float RGB, normalized, (B, 3, H, W); with ``preprocess`` uint8 RGB,
    (B, H, W, 3), as image decoders give it.

    Args:
        model: of mmpretrain, mmdet or mmseg, in eval mode.
        preprocess: normalize inside the graph, with the model's own mean and std.
        half: dtype of the network inside, for float inputs and outputs; None for float32.
        output: one of ``choices``.

    Attributes:
        names: of the outputs.
    """

    #: what ``output`` can be, the default first; none where there is no choice
    choices: tuple[str, ...] = ()

    def __init__(self, model, preprocess=False, half=None, output=None):
        super().__init__()
        if output not in (None, *self.choices):
            known = ' or '.join(self.choices) or 'no choice of outputs'
            raise FastViTError(f'a {self.task()} has {known}, not {output!r}')
        self.names = (output or self.choices[0],) if self.choices else ()
        self.model = plain_layers(model)
        self.half = half
        self.preprocess = preprocess
        mean, std = normalization(model)
        if preprocess:
            self.register_buffer('mean', mean)
            self.register_buffer('std', std)
        if half:
            self.reduce(half)

    @classmethod
    def task(cls) -> str:
        return cls.__name__.lower()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.preprocess:
            if image.dtype == torch.uint8:  # Core ML gives floats, (B, 3, H, W)
                image = image.permute(0, 3, 1, 2).float()
            image = (image - self.mean) / self.std
        return self.outputs(image)

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def reduce(self, half: torch.dtype) -> None:
        self.model.to(half)

    def network(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The model's own function of an image, without what follows it."""
        return self.model(x, mode='tensor')

    def run(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """:meth:`network` in the dtype ``half``, its outputs in float32."""
        if self.half is None:
            return self.network(x)
        y = self.network(x.to(self.half))
        return y.float() if isinstance(y, Tensor) else tuple(t.float() for t in y)


def normalization(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (3, 1, 1), of RGB values from 0 to 255.

    Raises:
        FastViTError: a model that wants BGR.
    """
    preprocessor = model.data_preprocessor
    converts = ('to_rgb', 'channel_conversion', '_channel_conversion')
    if not any(getattr(preprocessor, name, False) for name in converts):
        raise FastViTError('the config leaves images in BGR; exported files take RGB')
    mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
    if mean is None or std is None:
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    return mean.float().view(3, 1, 1), std.float().view(3, 1, 1)


class Classifier(Graph):
    """``logits`` or ``probabilities``: (B, classes)."""

    choices = ('logits', 'probabilities')

    def outputs(self, x):
        logits = self.run(x)
        return (logits.softmax(1) if self.names == ('probabilities',) else logits,)


class Embedder(Graph):
    """``embeddings``: (B, width), not normalized."""

    choices = ('embeddings',)

    def outputs(self, x):
        return (self.run(x),)


class Segmentor(Graph):
    """``logits`` (B, classes, H, W) at input size, or their best ``labels`` (B, H, W), int64."""

    choices = ('logits', 'labels')

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        head = self.model.decode_head
        if isinstance(head, nn.ModuleList):
            raise FastViTError('a cascade of decode heads cannot be exported')
        if self.names == ('labels',) and head.out_channels == 1:
            raise FastViTError('a binary segmentor has a threshold, not labels: export its logits')
        self.align_corners = head.align_corners

    def outputs(self, x):
        logits = self.run(x)
        logits = F.interpolate(
            logits, x.shape[-2:], mode='bilinear', align_corners=self.align_corners
        )
        return (logits.argmax(1) if self.names == ('labels',) else logits,)


class Detector(Graph):
    """A two-stage detector with box and mask heads, from image to detections, NMS inside.

    Takes one image of any size. Gives, best first, ``boxes`` (N, 4), x1 y1 x2 y2 in pixels of the
    input; ``scores`` (N,); ``labels`` (N,) int64; ``masks`` (N, H, W) bool; and ``mask_crops``
    (N, h, w), what ``masks`` were made of: probabilities inside the box. The last two only from a
    model with a mask head.

    Where :mod:`mmdet` branches on the number of boxes, this keeps the number fixed and marks what
    does not count by the score :data:`NEVER`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        rpn, roi = self.model.rpn_head, self.model.roi_head
        known = (
            type(rpn).__name__ == 'RPNHead'
            and type(roi).__name__ == 'StandardRoIHead'
            and all(
                type(layer).__name__ == 'RoIAlign' and layer.use_torchvision is False
                for extractor in self.extractors()
                for layer in extractor.roi_layers
            )
            and not roi.bbox_head.reg_class_agnostic
            and not roi.bbox_head.custom_cls_channels
            and rpn.use_sigmoid_cls
        )
        settings = (self.model.test_cfg.rpn, self.model.test_cfg.rcnn)
        if not known or any(s.nms.get('type', 'nms') != 'nms' for s in settings):
            raise FastViTError(
                f'{type(self.model).__name__}: only Faster and Mask R-CNN with RoIAlign and '
                'plain NMS can be exported'
            )
        self.with_mask = roi.with_mask
        self.names = ('boxes', 'scores', 'labels')
        if self.with_mask:
            self.names += ('masks', 'mask_crops')
        self.anchors = rpn.prior_generator.base_anchors  # of one position, (A, 4) each level
        self.strides = [s[0] for s in rpn.prior_generator.strides]

    def network(self, x):
        return self.model.extract_feat(x)

    def reduce(self, half):
        self.model.backbone.to(half)  # boxes need more digits
        if self.model.with_neck:
            self.model.neck.to(half)

    def extractors(self):
        roi = self.model.roi_head
        return [roi.bbox_roi_extractor] + ([roi.mask_roi_extractor] if roi.with_mask else [])

    def outputs(self, x):
        size = height, width = x.shape[-2:]
        divisor = self.model.data_preprocessor.pad_size_divisor
        # never the shorter -n // divisor: ONNX rounds that quotient towards zero
        right, below = ((n + divisor - 1) // divisor * divisor - n for n in (width, height))
        x = F.pad(x, (0, right, 0, below))
        feats = self.run(x)
        proposals, valid = self.proposals(feats, size)
        boxes, scores, labels = self.detections(feats, proposals, valid, size)
        if not self.with_mask:
            return boxes, scores, labels
        crops = self.mask_crops(feats, boxes, labels)
        threshold = self.model.test_cfg.rcnn.mask_thr_binary
        return boxes, scores, labels, paste(crops, boxes, size) >= threshold, crops

    def proposals(self, feats, size):
        """The RPN's boxes (P, 4), and which of them count (P,)."""
        cfg = self.model.test_cfg.rpn
        all_boxes, all_scores, levels = [], [], []
        scores_of, deltas_of = self.model.rpn_head(feats)
        for i, (score, delta) in enumerate(zip(scores_of, deltas_of, strict=True)):
            anchors = self.anchors_at(i, score.shape[-2:]).to(score)
            # Ranked by its logit: of small ones, ONNX Runtime's sigmoid keeps one or two digits.
            score = score[0].permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
            delta = delta[0].permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
            score, delta = score.view(-1), delta.view(-1, 4)
            if cfg.nms_pre > 0:
                # as many everywhere, so that a level of any size can give its best
                score = F.pad(score, (0, cfg.nms_pre), value=NEVER)
                delta, anchors = (F.pad(t, (0, 0, 0, cfg.nms_pre)) for t in (delta, anchors))
                score, best = score.topk(cfg.nms_pre)
                delta, anchors = delta[best], anchors[best]
            all_boxes.append(decode(self.model.rpn_head.bbox_coder, anchors, delta, size))
            all_scores.append(score)
            levels.append(torch.full_like(score, i))
        boxes, scores = torch.cat(all_boxes), torch.cat(all_scores)
        if cfg.min_bbox_size >= 0:
            big = ((boxes[:, 2:] - boxes[:, :2]) > cfg.min_bbox_size).all(1)
            scores = torch.where(big, scores, NEVER)
        kept = nms(apart(boxes, torch.cat(levels), size), scores, cfg.nms.iou_threshold)
        chosen = torch.zeros_like(scores).index_fill(0, kept, 1.0)
        scores = torch.where(chosen > 0, scores, NEVER)
        scores, best = F.pad(scores, (0, cfg.max_per_img), value=NEVER).topk(cfg.max_per_img)
        return F.pad(boxes, (0, 0, 0, cfg.max_per_img))[best], scores > NEVER

    def anchors_at(self, level, feat_size):
        rows, columns = (torch.arange(n) * self.strides[level] for n in feat_size)
        y, x = torch.meshgrid(rows, columns, indexing='ij')
        corner = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        return (corner + self.anchors[level]).reshape(-1, 4)

    def detections(self, feats, proposals, valid, size):
        cfg, head = self.model.test_cfg.rcnn, self.model.roi_head.bbox_head
        rois = self.align(self.model.roi_head.bbox_roi_extractor, feats, proposals)
        logits, deltas = head(rois)
        scores = logits.softmax(-1)[:, :-1] * valid[:, None]
        classes = scores.shape[1]
        of_classes = proposals[:, None].expand(-1, classes, 4).reshape(-1, 4)
        boxes = decode(head.bbox_coder, of_classes, deltas.reshape(-1, 4), size)
        labels = torch.arange(classes, device=scores.device).expand_as(scores).reshape(-1)
        scores = scores.reshape(-1)
        sure = (scores > cfg.score_thr).nonzero().squeeze(1)
        boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
        kept = nms(apart(boxes, labels, size), scores, cfg.nms.iou_threshold)
        kept = kept[: cfg.max_per_img] if cfg.max_per_img > 0 else kept
        return boxes[kept], scores[kept], labels[kept]

    def mask_crops(self, feats, boxes, labels):
        roi = self.model.roi_head
        masks = roi.mask_head(self.align(roi.mask_roi_extractor, feats, boxes))
        if roi.mask_head.class_agnostic:
            return masks[:, 0].sigmoid()
        chosen = labels[:, None, None, None].expand(-1, 1, *masks.shape[2:])
        return masks.gather(1, chosen)[:, 0].sigmoid()

    @staticmethod
    def align(extractor, feats, boxes):
        """Features (N, C, h, w) of boxes (N, 4), each from the level that suits its size."""
        feats = feats[: extractor.num_inputs]
        rois = F.pad(boxes, (1, 0))
        level = extractor.map_roi_levels(rois, len(feats))
        out = None
        for i, (layer, feat) in enumerate(zip(extractor.roi_layers, feats, strict=True)):
            here = (level == i).nonzero().squeeze(1)
            part = roi_align(
                feat,
                rois[here],
                layer.output_size,
                layer.spatial_scale,
                layer.sampling_ratio,
                layer.aligned,
            )
            if out is None:
                out = part.new_zeros(boxes.shape[0], *part.shape[1:])
            out = out.index_put((here,), part)
        return out


class AveragePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, for images of any size and every runtime.

    ONNX has no adaptive pooling: its writer unrolls the cells of the one size that it sees.

    Args:
        output_size: cells, or (height, width) in cells; None keeps that of the image.
    """

    def __init__(self, output_size):
        super().__init__()
        pair = output_size if isinstance(output_size, tuple | list) else (output_size,) * 2
        self.cells = tuple(pair)

    def forward(self, x: Tensor) -> Tensor:
        for axis, cells in zip((-2, -1), self.cells, strict=True):
            if cells is not None:
                x = (x.transpose(axis, -1) @ means(x.shape[axis], cells, x)).transpose(axis, -1)
        return x


def means(pixels: int, cells: int, like: Tensor) -> Tensor:
    """(pixels, cells): what each of ``pixels`` in a row adds to the mean of each cell. Cells begin
    and end at whole pixels and may share one, as PyTorch defines it."""
    cell, pixel = (torch.arange(n, device=like.device) for n in (cells, pixels))
    first = cell * pixels // cells
    end = ((cell + 1) * pixels + cells - 1) // cells
    inside = torch.logical_and(pixel[:, None] >= first, pixel[:, None] < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)


def plain_layers(model: nn.Module) -> nn.Module:
    """Layers that a graph can hold: PyTorch's own for OpenMMLab's, which read a size as a number or
    ask if it is 0, and ours for pooling to a grid."""
    plain = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.MaxPool2d)
    for name, module in list(model.named_modules()):
        if type(module) is nn.AdaptiveAvgPool2d and module.output_size not in (1, (1, 1)):
            model.set_submodule(name, AveragePool(module.output_size))
        if type(module).__module__.startswith('mmseg.') and type(module).__name__ == 'Upsample':
            args = (module.size, module.scale_factor, module.mode, module.align_corners)
            model.set_submodule(name, nn.Upsample(*args))
        for kind in plain:
            if isinstance(module, kind) and type(module).__module__.startswith('mmcv.'):
                module.__class__ = kind
    return model


def decode(coder, boxes: Tensor, deltas: Tensor, size) -> Tensor:
    """Boxes (N, 4) moved by deltas (N, 4) and clipped to an image of ``size``, height and width."""
    x1, y1, x2, y2 = coder.decode(boxes, deltas, max_shape=None).unbind(-1)
    height, width = size
    x1, x2 = (x.clamp(0, width) for x in (x1, x2))
    y1, y2 = (y.clamp(0, height) for y in (y1, y2))
    return torch.stack([x1, y1, x2, y2], -1)


def apart(boxes: Tensor, group: Tensor, size) -> Tensor:
    """Boxes (N, 4) in an image of ``size``, moved so that no two groups overlap."""
    height, width = size
    return boxes + (group.to(boxes) * (height + width + 1))[:, None]


def paste(crops: Tensor, boxes: Tensor, size) -> Tensor:
    """Crops (N, h, w), stretched to their boxes, on empty images (N, H, W).

    Bilinear sampling is separable: weights of rows, times the crop, times weights of columns.
    """
    x1, y1, x2, y2 = boxes.unbind(1)

    def weights(low, high, pixels, cells):
        centers = torch.arange(pixels).to(boxes) + 0.5
        at = (centers - low[:, None]) / (high - low)[:, None] * cells - 0.5
        near = 1 - (at[:, :, None] - torch.arange(cells).to(boxes)).abs()
        return near.clamp(min=0)

    rows = weights(y1, y2, size[0], crops.shape[1])
    columns = weights(x1, x2, size[1], crops.shape[2])
    return rows @ crops @ columns.transpose(1, 2)


def embeds(model: nn.Module) -> bool:
    """Whether a model gives embeddings: it has a zero-shot head without texts."""
    return getattr(getattr(model, 'head', None), 'class_names', None) == ()


def kind_of(model: nn.Module) -> type[Graph]:
    """The graph that fits a model of mmpretrain, mmdet or mmseg.

    Raises:
        FastViTError: none does.
    """
    if hasattr(model, 'export_graph'):  # it says so itself
        return model.export_graph()
    if hasattr(model, 'rpn_head') and hasattr(model, 'roi_head'):
        return Detector
    if hasattr(model, 'decode_head'):
        return Segmentor
    if embeds(model):
        return Embedder
    if isinstance(model, BaseModule) and hasattr(model, 'head'):
        return Classifier
    raise FastViTError(
        f'{type(model).__name__} cannot be exported: a classifier, a segmentor, '
        'or a two-stage detector can'
    )


def graph_of(
    model: nn.Module,
    preprocess: bool = False,
    half: torch.dtype | None = None,
    output: str | None = None,
) -> Graph:
    """The graph of a model; takes the model over. Arguments and errors: see :class:`Graph`."""
    return kind_of(model)(model, preprocess, half, output)
