"""Files that run elsewhere: ONNX, torch.export, OpenVINO and Core ML."""

from .formats import FORMATS, export
from .runtime import SUFFIXES, Session, attach
from .verify import verify

__all__ = ['FORMATS', 'SUFFIXES', 'Session', 'attach', 'export', 'verify']
