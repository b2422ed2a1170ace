"""Options that several commands have. Help has to be quick: nothing here imports anything large."""

import argparse
import sys
from pathlib import Path


class SettingsAction(argparse.Action):
    """``--cfg-options``, read as mmengine does."""

    def __call__(self, parser, namespace, values, option_string=None):
        from fastvit_mm.settings import OptionsAction

        read = OptionsAction(self.option_strings, self.dest)
        read(parser, namespace, values, option_string)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # NumPy's limit
        raise argparse.ArgumentTypeError(f'{text!r} is not an integer from 0 to 4294967295')
    return int(text)


def side(text: str) -> int:
    if not text.isdecimal() or int(text) < 32:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of pixels, at least 32')
    return int(text)


def size_argument(parser: argparse.ArgumentParser) -> None:
    says = "image size (of the config's test)"
    parser.add_argument('--size', nargs=2, type=side, metavar=('H', 'W'), help=says)


def parser(description: str, **kwargs) -> argparse.ArgumentParser:
    """A parser that knows whether it is that of a tool or of a command of `fastvit`."""
    program, *words = sys.argv
    command = Path(program).name in ('fastvit', '__main__.py') and words
    prog = f'fastvit {words[0]}' if command else None
    return argparse.ArgumentParser(prog=prog, description=description, **kwargs)


def debug_argument(parser: argparse.ArgumentParser) -> None:
    """The argument that ``launch.run`` looks for."""
    says = 'show every message, and the traceback of an error'
    parser.add_argument('--debug', action='store_true', help=says)


def config_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of every command that takes a config, for ``launch.load_config``."""
    own = parser(description)
    own.add_argument('config', help='config file, or fastvit_mm::<task>/<name>')
    own.add_argument('--demo', action='store_true', help='shrink the config to the demo data')
    own.add_argument(
        '--cfg-options',
        nargs='+',
        action=SettingsAction,
        metavar='KEY=VALUE',
        help='settings to change',
    )
    debug_argument(own)
    own.set_defaults(work_dir=None, launcher='none', local_rank=0)
    return own


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The same plus the arguments of the commands that start a run."""
    own = config_parser(description)
    own.add_argument('--work-dir', help='folder for logs and checkpoints')
    own.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='job launcher'
    )
    own.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return own
