"""Files that run elsewhere: ONNX, torch.export, OpenVINO and Core ML."""

from .formats import FORMATS, export
from .runtime import Session, attach, is_exported
from .verify import verify

__all__ = ['FORMATS', 'Session', 'attach', 'export', 'is_exported', 'verify']
