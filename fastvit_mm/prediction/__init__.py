"""Predictions on images, folders and videos: what is read, drawn, and written as JSON."""

from .loop import load, look
from .sources import Stills, Video, open_input

__all__ = ['Stills', 'Video', 'load', 'look', 'open_input']
