"""Writing: one trace of a graph by torch.export, from which every format is made."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.fx.experimental._config as fx_config
import torch.nn as nn
from mmcv.cnn import ConvModule, fuse_conv_bn
from torch.export import Dim, ExportedProgram

from fastvit_mm.errors import FastViTError, require
from fastvit_mm.reparameterize import absorb_output_norms, deploy_form

from .graphs import Detector, Graph, graph_of, kind_of

#: What ONNX files are written in; the first with Gelu as one operator.
OPSET = 20

#: Least height and width of the example that a file for any size is traced with.
DYNAMIC = (160, 224)

#: Key of the JSON in a file's metadata that says what the file takes and gives.
KEY = 'fastvit_mm'


def example(graph: Graph, size: tuple[int, int], batch: int, planes: bool) -> torch.Tensor:
    """An input of ``graph``; ``planes``: pixel values as (B, 3, H, W) even where it normalizes."""
    height, width = size
    if graph.preprocess and not planes:
        return torch.randint(256, (batch, height, width, 3), dtype=torch.uint8)
    return torch.randn(batch, 3, height, width)


def trace(graph: Graph, size, batch: int, dynamic: bool, planes: bool = False) -> ExportedProgram:
    """``graph`` as operators on tensors, without Python.

    Args:
        size: height and width of an image.
        dynamic: let the file take any number of images of any size; a detector always takes one.
    """
    graph = graph.eval().requires_grad_(False)
    varies = {}
    if dynamic:
        # no feature map of the example may have an edge of 1, which would be taken for fixed
        size = max(size[0], DYNAMIC[0]), max(size[1], DYNAMIC[1])
        first = 1 if graph.preprocess and not planes else 2
        varies = {first: Dim.AUTO, first + 1: Dim.AUTO}
        if not isinstance(graph, Detector):
            varies[0] = Dim.AUTO
            batch = max(batch, 2)
    # Else sizes that are larger than 1 in the example would have to stay so.
    with fx_config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(
            graph,
            (example(graph, size, batch, planes),),
            dynamic_shapes=(varies,) if varies else None,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    drop_asserts(program)
    shape = next(n for n in program.graph.nodes if n.name == 'image').meta['val'].shape
    if fixed := [i for i in varies if isinstance(shape[i], int)]:
        raise FastViTError(
            f'{type(graph.model).__name__} fixes the size of its input (dimension {fixed[0]}): '
            'export without --dynamic'
        )
    return program


def drop_asserts(program: ExportedProgram) -> None:
    """Take out what the tracer noted about sizes: it believes that there are two boxes at least."""
    nodes = program.graph_module.graph.nodes
    for node in [n for n in nodes if n.target is torch.ops.aten._assert_scalar.default]:
        program.graph_module.graph.erase_node(node)
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()


def write_torch(program: ExportedProgram, graph: Graph, path: Path, info: dict) -> None:
    torch.export.save(program, path, extra_files={KEY: json.dumps(info)})


def write_onnx(program: ExportedProgram, graph: Graph, path: Path, info: dict) -> None:
    import onnx

    torch.onnx.export(
        program,
        (),
        path,
        dynamo=True,
        opset_version=OPSET,
        external_data=False,
        input_names=['image'],
        output_names=list(graph.names),
        verbose=False,
    )
    model = onnx.load(path)
    name_dimensions(model, graph)
    texts = {KEY: json.dumps(info), 'classes': json.dumps(info['classes'])}
    for key, value in texts.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def name_dimensions(model, graph: Graph) -> None:
    """The tracer's ``s6`` and ``s73`` become ``height`` and ``width``; its terms for sizes inside,
    which not all readers understand, go."""
    axes = (0, 1, 2) if graph.preprocess else (0, 2, 3)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    words = {dims[i].dim_param: n for i, n in zip(axes, ('batch', 'height', 'width'), strict=True)}
    words.pop('', None)
    if not words:
        return
    del model.graph.value_info[:]
    pattern = re.compile(rf'\b({"|".join(words)})\b')
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda m: words[m[0]], dim.dim_param)


def write_openvino(program: ExportedProgram, graph: Graph, path: Path, info: dict) -> None:
    import openvino

    # by way of ONNX, as OpenVINO's own reader of torch.export knows no NMS
    onnx_file = path.with_suffix('.onnx.tmp')
    try:
        write_onnx(program, graph, onnx_file, info)
        model = openvino.convert_model(onnx_file)
    finally:
        onnx_file.unlink(missing_ok=True)
    model.set_rt_info(json.dumps(info), [KEY])
    openvino.save_model(model, path, compress_to_fp16=info['half'])


def write_coreml(program: ExportedProgram, graph: Graph, path: Path, info: dict) -> None:
    import coremltools

    if isinstance(graph, Detector):
        raise FastViTError('Core ML takes classifiers and segmentors: export a detector as ONNX')
    if info['size'] is None:
        raise FastViTError('a Core ML file takes one size: export without --dynamic')
    args = {}
    if graph.preprocess:
        shape = (info['batch'], 3, *info['size'])
        args['inputs'] = [coremltools.ImageType('image', shape, color_layout='RGB')]
    if graph.names == ('probabilities',) and info['classes']:
        args['classifier_config'] = coremltools.ClassifierConfig(unique(info['classes']))
    else:
        args['outputs'] = [coremltools.TensorType(name) for name in graph.names]
    precision = coremltools.precision
    model = coremltools.convert(
        program.run_decompositions({}),
        convert_to='mlprogram',
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=precision.FLOAT16 if info['half'] else precision.FLOAT32,
        **args,
    )
    model.user_defined_metadata[KEY] = json.dumps(info)
    model.save(str(path))


def unique(names: list[str]) -> list[str]:
    """Core ML keys probabilities by name; ImageNet has two kinds of crane."""
    seen = set()
    return [f'{n} ({i})' if n in seen or seen.add(n) else n for i, n in enumerate(names)]


@dataclass
class Format:
    """A file format.

    Attributes:
        suffix: of its files.
        write: from the trace, the graph, a path and the file's description.
        half: the dtype that ``half`` traces the network in; None where the writer reduces it.
        needs: the packages that write and verify it.
    """

    suffix: str
    write: Callable[[ExportedProgram, Graph, Path, dict], None]
    half: torch.dtype | None = None
    needs: tuple[str, ...] = ()


ONNX = ('onnx', 'onnxscript')
FORMATS = {
    'onnx': Format('.onnx', write_onnx, torch.float16, (*ONNX, 'onnxruntime')),
    'torch': Format('.pt2', write_torch, torch.bfloat16),
    'openvino': Format('.xml', write_openvino, needs=('openvino', *ONNX)),
    'coreml': Format('.mlpackage', write_coreml, needs=('coremltools',)),
}


def export(
    model: nn.Module,
    path: str | Path,
    format: str = 'onnx',
    *,
    size: tuple[int, int],
    batch: int = 1,
    dynamic: bool = False,
    preprocess: bool = False,
    half: bool = False,
    output: str | None = None,
) -> dict:
    """Reparameterize ``model`` and write it to a file; :func:`fastvit_mm.export.verify` proves it.

    Args:
        model: of mmpretrain, mmdet or mmseg, in eval mode; stays as it is.
        format: a key of :data:`FORMATS`.
        size: height and width of the images; with ``dynamic`` an example.
        batch: number of images that the file takes at once.
        dynamic: any number of images of any size. A detector takes one, of any size, always.
        preprocess: take uint8 RGB, (B, H, W, 3), and normalize it inside.
        half: float16 inside (``torch``: bfloat16, but for detectors), inputs and outputs as ever.
        output: of a classifier ``logits`` or ``probabilities``, of a segmentor ``logits`` or
            ``labels``; the first by default.

    Returns:
        What the file says of itself: task, size, batch, names of outputs, classes ...

    Raises:
        FastViTError: a package that is missing, or a model that the format cannot hold.
    """
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 9):
        raise FastViTError(f'exporting needs torch 2.9 or newer, this is {torch.__version__}')
    path, chosen = Path(path), FORMATS[format]
    if chosen.needs:
        require(f'a {chosen.suffix} file', *chosen.needs)
    model = merge(model)
    detector = kind_of(model) is Detector
    dtype = torch.float16 if detector and chosen.half else chosen.half  # boxes need its digits
    graph = graph_of(model, preprocess, dtype if half else None, output)
    dynamic = dynamic or detector
    if detector and batch != 1:
        raise FastViTError('a detector takes one image at a time: leave out --batch')
    meta = getattr(model, 'dataset_meta', None) or {}
    info = dict(
        task=graph.task(),
        preprocess=preprocess,
        size=None if dynamic else list(size),
        batch=None if dynamic and not detector else batch,
        half=half,
        outputs=list(graph.names),
        classes=[str(name) for name in meta.get('classes') or []],
    )
    program = trace(graph, size, batch, dynamic, planes=format == 'coreml')
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen.write(program, graph, path, info)
    return info


def merge(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU with nothing left to merge, whichever form it has."""
    merged = deploy_form(model).cpu()
    absorb_output_norms(merged)
    for module in merged.modules():  # those of necks and heads
        if isinstance(module, ConvModule) and module.order[:2] == ('conv', 'norm'):
            fuse_conv_bn(module)
    return merged
