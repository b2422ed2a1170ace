"""Train a config:
python tools/train.py CONFIG [--demo] [--resume [auto|FILE]] [--overwrite] [--amp [fp16|bf16]] ...
"""

import fastvit_mm  # noqa: F401
from fastvit_mm import launch, weights
from fastvit_mm.errors import FastViTError, require
from fastvit_mm.running import train_options, work_dir


def main(argv: list[str] | None = None) -> None:
    parser = launch.argument_parser('Train a model.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from FILE, or (auto) from the latest checkpoint in the work dir',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help="replace an earlier run's checkpoints"
    )
    parser.add_argument(
        '--nonfinite',
        choices=['stop', 'skip'],
        help='what to do when a loss or gradient is NaN or infinite (stop)',
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
    if args.resume and args.overwrite:
        raise FastViTError(
            '--resume continues the run in the work dir, --overwrite begins another in its place: '
            'give one (--resume also continues a run that was begun with --overwrite)'
        )
    if args.resume not in (None, 'auto'):
        cfg.resume, cfg.load_from = True, args.resume
    if args.tensorboard:
        train_options.log_to_tensorboard(cfg)
    if cfg.get('load_from'):
        cfg.load_from = str(weights.find(cfg.load_from))
    if args.nonfinite:
        hook = dict(type='FiniteLossHook', action=args.nonfinite)
        cfg.merge_from_dict({'default_hooks.finite': hook})
    launch.check_data(cfg, 'train', 'val')

    resume = args.resume or cfg.get('resume')
    with work_dir.claim(cfg.work_dir, resume, args.overwrite, cfg.launcher):
        runner = launch.Runner.from_cfg(cfg)
        if args.resume == 'auto':
            runner.resume_latest()
        if args.overwrite:
            runner.register_hook(work_dir.OverwriteHook())
        runner.train()
