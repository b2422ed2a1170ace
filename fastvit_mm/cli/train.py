"""Train a config:
python tools/train.py CONFIG [--demo] [--resume [auto|FILE]] [--overwrite] [--amp [fp16|bf16]] ...
"""

import argparse

from . import options


def main(argv: list[str] | None = None) -> None:
    parser = options.argument_parser('Train a model.')
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
    add_arguments(parser)
    args = parser.parse_args(argv)

    from fastvit_mm import launch, weights
    from fastvit_mm.errors import FastViTError
    from fastvit_mm.running import train_options, work_dir

    train_options.check_loggers(args)
    cfg = launch.load_config(args, training=True)
    train_options.apply(cfg, args)
    if args.resume and args.overwrite:
        raise FastViTError(
            '--resume continues the run in the work dir, --overwrite begins another in its place: '
            'give one (--resume also continues a run that was begun with --overwrite)'
        )
    if args.resume not in (None, 'auto'):
        cfg.resume, cfg.load_from = True, args.resume
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``train_options.apply`` knows."""
    parser.add_argument('--seed', type=options.seed, metavar='N', help="random seed (the config's)")
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='only algorithms that give the same bits in every run with the same seed; slower',
    )
    parser.add_argument('--no-validate', action='store_true', help='only train')
    parser.add_argument(
        '--early-stop',
        type=options.positive,
        metavar='N',
        help='end when N validations in a row are not better than the best before them, by the '
        'metric that chooses the best checkpoint',
    )
    parser.add_argument(
        '--log',
        nargs='+',
        choices=['tensorboard', 'wandb', 'mlflow'],
        default=[],
        help='log to them as well; their files are in vis_data/ of the run',
    )
    parser.add_argument('--tensorboard', action='store_true', help='the same as --log tensorboard')
    parser.add_argument(
        '--amp',
        nargs='?',
        const='auto',
        choices=['auto', 'fp16', 'bf16'],
        help='train in mixed precision: fp16 (the default on a GPU) or bf16 (on a CPU)',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by the batch size of all processes over the recipe's",
    )
    parser.add_argument(
        '--accumulate',
        type=options.positive,
        default=1,
        metavar='N',
        help="batches of N times the config's size, computed in N parts with the memory of one; "
        'an iteration (max_iters, schedules) is one such batch. Equals the large batch up to '
        'rounding, except that BatchNorm normalizes each part by itself and that Mixup and CutMix '
        'are drawn for each part',
    )
    parser.add_argument(
        '--compile',
        nargs='?',
        const='inductor',
        metavar='BACKEND',
        help='train with backbone and neck compiled by torch.compile (inductor)',
    )
