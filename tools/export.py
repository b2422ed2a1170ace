"""Export a model to a file that runs elsewhere, and check that it computes the same:
python tools/export.py CONFIG CHECKPOINT --format onnx|torch|openvino|coreml --out FILE ...
"""

from fastvit_mm import launch
from fastvit_mm.cli.export import main

if __name__ == '__main__':
    launch.run(main)
