"""Train a config:
python tools/train.py CONFIG [--demo] [--resume [auto|FILE]] [--amp [fp16|bf16]] ...
"""

from mmengine.config import Config

import fastvit_mm  # noqa: F401
from fastvit_mm import launch, train_options, weights
from fastvit_mm.errors import require


def log_to_tensorboard(cfg: Config) -> None:
    """Make the visualizer also write TensorBoard's event files."""
    cfg.setdefault('visualizer', dict(type='Visualizer'))
    backends = cfg.visualizer.get('vis_backends') or [dict(type='LocalVisBackend')]
    if all(one['type'] != 'TensorboardVisBackend' for one in backends):
        cfg.visualizer.vis_backends = [*backends, dict(type='TensorboardVisBackend')]


def main(argv: list[str] | None = None) -> None:
    parser = launch.argument_parser('Train a model.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from FILE, or (auto) from the latest checkpoint in the work dir',
    )
    parser.add_argument(
        '--tensorboard', action='store_true', help='log to vis_data/ for `tensorboard --logdir`'
    )
    train_options.add_arguments(parser)
    args = parser.parse_args(argv)

    if args.tensorboard:
        require('--tensorboard', 'tensorboard')
    cfg = launch.load_config(args, training=True)
    train_options.apply(cfg, args)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.tensorboard:
        log_to_tensorboard(cfg)
    if cfg.get('load_from'):
        cfg.load_from = str(weights.find(cfg.load_from))
    launch.check_data(cfg, 'train', 'val')

    launch.Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    launch.run(main)
