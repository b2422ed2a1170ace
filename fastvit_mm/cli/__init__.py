"""The command `fastvit`: a module for each of its commands, with nothing but their options.

A module has ``main(argv)``; its command is a row of :data:`COMMANDS`.
"""

import argparse
import sys
from importlib import import_module

COMMANDS = {
    'train': 'train a config',
    'test': 'measure the accuracy of a checkpoint or an exported file',
    'infer': 'draw predictions on images, folders, videos',
    'export': 'write ONNX, PyTorch, OpenVINO or Core ML, and verify the file',
    'check': "list what is wrong with a config's data",
    'plot': "draw a run's losses and metrics",
    'convert': 'convert weights between timm, the authors and OpenMMLab',
    'robustness': 'measure accuracy on corrupted and other images',
    'benchmark': 'measure speed against timm and other networks',
    'demo': 'train, test and compare on generated data',
}


def main() -> None:
    """Run the command that the command line names, as its tool would run."""
    parser = argparse.ArgumentParser(
        prog='fastvit',
        usage='fastvit COMMAND ...',
        description='FastViT for classification, detection, segmentation and hand meshes.',
        epilog='fastvit COMMAND --help lists the options of a command.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.suggest_on_error = True
    commands = parser.add_subparsers(title='commands', metavar='', required=True, dest='COMMAND')
    for name, says in COMMANDS.items():
        commands.add_parser(name, help=says, add_help=False)
    command = parser.parse_known_args(sys.argv[1:2])[0].COMMAND
    module = import_module(f'{__name__}.{command}')

    from fastvit_mm import launch

    # what argparse calls the program in its help and its errors
    sys.argv[:2] = [f'fastvit {command}']
    launch.run(module.main)
