"""Visualize predictions:
python tools/infer.py CONFIG CHECKPOINT_OR_EXPORTED IMAGE|FOLDER|VIDEO|- --out D [--json] ...

A folder is searched recursively, in sorted order, for all images that OpenCV can read; pictures
keep names and subfolders: FOLDER/a/b.png becomes D/a/b.jpg. A video VIDEO.avi becomes D/VIDEO.mp4
of the same size (odd sizes lose one pixel) and frame rate. `-` is one encoded image on standard
input.

Images are rotated upright according to their EXIF data, in pictures and JSON. An image that cannot
be read is reported and skipped; the exit code is then 1.

--json writes D/NAME.predictions.json and D/NAME.images.json, where NAME is the input's name. The
first is a list in COCO's results format, the second explains its ids: `images` are numbered from 1
(frames have a `frame_index` from 0), `categories` are the model's classes in order, from 1.
The results of each task:
  detection       image_id, category_id, score, bbox [x, y, width, height], segmentation (RLE)
  segmentation    image_id, category_id, segmentation (RLE): one for each class present
  classification  image_id, category_ids, labels, scores: the five most likely classes
  embedding       image_id, embedding: a list of numbers, without a picture (docs/family.md)
  hand mesh       image_id, xyz, verts (metres, relative to the root joint), uv (pixels)
COCO('D/NAME.images.json').loadRes('D/NAME.predictions.json') reads the first two.
"""

import argparse
import sys
from pathlib import Path

from . import options


def main(argv: list[str] | None = None) -> None:
    description, _, details = __doc__.partition('\n\n')
    parser = options.config_parser(description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = details
    parser.add_argument('checkpoint', help='weights in any layout, or an exported file')
    parser.add_argument('source', metavar='input', help='image, folder, video, or - for stdin')
    parser.add_argument('--out', required=True, help='folder for the pictures')
    parser.add_argument('--reparam', action='store_true', help='use the deploy form')
    parser.add_argument(
        '--score-thr', type=float, metavar='SCORE', help='minimum score of a box, 0 to 1 (0.3)'
    )
    parser.add_argument('--json', action='store_true', help="also write COCO's JSON formats")
    parser.add_argument(
        '--turntable', action='store_true', help='of a hand mesh, a GIF that turns, beside each'
    )
    parser.add_argument(
        '--cam',
        type=int,
        metavar='STAGE',
        help='instead, draw where the prediction comes from: Grad-CAM over a stage, from 0 on',
    )
    parser.add_argument(
        '--cam-class', metavar='CLASS', help='name or number of the class (the predicted one)'
    )
    parser.add_argument('--device', help='cpu, cuda, cuda:1 ... (cuda if available)')
    parser.add_argument(
        '--batch-size',
        type=options.positive,
        metavar='N',
        help='images that are computed together, if they have the same size (1)',
    )
    args = parser.parse_args(argv)

    import torch

    from fastvit_mm import launch
    from fastvit_mm.errors import FastViTError
    from fastvit_mm.export.graphs import embeds
    from fastvit_mm.prediction import load, look, open_input

    threshold = 0.3 if args.score_thr is None else args.score_thr
    if not 0 <= threshold <= 1:
        raise FastViTError(f'--score-thr {threshold} is not between 0 and 1')
    out = Path(args.out)
    source = open_input(args.source, out)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    cfg = launch.load_config(args)
    if args.turntable and cfg.model.type != 'HandMesh':
        raise FastViTError('--turntable is for hand meshes: leave it out')
    if args.cam is None and args.cam_class is not None:
        raise FastViTError('--cam-class is for --cam: give a stage, such as --cam 3')
    if args.cam is not None:
        others = ('json', 'turntable', 'score_thr', 'batch_size')
        values = {f'--{name.replace("_", "-")}': getattr(args, name) for name in others}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if given:
            raise FastViTError(f'--cam draws nothing else: leave out {" and ".join(given)}')
    model = load(cfg, args.checkpoint, device, args.reparam)
    if args.cam is None and embeds(model) and not args.json:
        raise FastViTError('there is no picture of an embedding: add --json')
    try:
        out.mkdir(parents=True, exist_ok=True)
        if args.cam is not None:
            from fastvit_mm.evaluation import attention

            skipped = attention.look(model, source, out, args.cam, args.cam_class)
        else:
            how = threshold, args.json, args.turntable, args.batch_size or 1
            skipped = look(model, source, out, *how)
    except OSError as error:
        raise FastViTError(f'cannot write to {out}: {error}') from error
    if skipped:
        sys.exit(1)
