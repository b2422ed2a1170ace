"""The command `fastvit`: a module for each of its commands, with nothing but their options.

A module has ``main(argv)`` and, so that help is quick, imports what it needs after it has parsed
them. A command is a row of :data:`COMMANDS`.
"""

import difflib
import sys
from importlib import import_module
from pathlib import Path

COMMANDS = {
    'init': 'write a config for images of your own',
    'train': 'train a config',
    'test': 'measure the accuracy of a checkpoint or an exported file',
    'infer': 'draw predictions on images, folders and videos',
    'export': 'write ONNX, PyTorch, OpenVINO or Core ML, and verify the file',
    'info': 'layers, parameters, multiply-adds and memory of a config',
    'check': "list what is wrong with a config's data",
    'plot': 'draw the losses and metrics of runs',
    'convert': 'convert weights between timm, the authors and OpenMMLab',
    'robustness': 'measure accuracy on corrupted and other images',
    'benchmark': 'measure speed against timm and other networks',
    'demo': 'train, test and compare on generated data',
}
SLOW = {'benchmark'}  # its options are those of the modules that measure
HELP = {'-h', '--help'}


def overview() -> str:
    rows = (f'  {name:<12}{says}' for name, says in COMMANDS.items())
    return '\n'.join(
        [
            'usage: fastvit COMMAND ...\n',
            'FastViT for classification, detection, segmentation and hand meshes.\n',
            *rows,
            '\nA config is a file, or one of the package: fastvit_mm::<task>/<name>.',
            '`fastvit COMMAND --help` lists the options of a command.',
        ]
    )


def only_explains() -> bool:
    """Whether this process is the command `fastvit` and is only to print help, or to say that there
    is no such command."""
    program, *words = getattr(sys, 'argv', None) or ['']
    name = words[0] if words else ''
    asked = name not in COMMANDS or (name not in SLOW and not HELP.isdisjoint(words))
    return asked and is_ours(Path(program))


def is_ours(script: Path) -> bool:
    """Whether a script is the one that an installer has written for :func:`main`: anyone may call
    a program of their own fastvit."""
    if script.name != 'fastvit':
        return False
    try:
        return f'from {__name__} import main' in script.read_text(encoding='utf-8')
    except (OSError, UnicodeError):
        return False


def main() -> None:
    """Run the command that the command line names, as its tool would run."""
    name, *rest = sys.argv[1:] or ['--help']
    if name in HELP:
        sys.exit(print(overview()))
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f'did you mean {near[0]}?' if near else f'known are {", ".join(COMMANDS)}'
        sys.exit(print(f'error: there is no command {name}: {hint}', file=sys.stderr) or 2)
    command = import_module(f'{__name__}.{name}').main
    if not HELP.isdisjoint(rest):
        command(rest)

    from fastvit_mm import launch

    launch.run(command, rest)
