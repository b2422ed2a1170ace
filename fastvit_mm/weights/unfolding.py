"""Files that unfold in memory to a multiple of their size: refused before they are read."""

import io
import mmap
import re
import zipfile
from pathlib import Path

from fastvit_mm.errors import FastViTError

# The one type among those that torch accepts which makes, of a number, an object of that size.
FILLER = re.compile(rb'c(?:__builtin__|builtins)\nbytearray\n')


def refuse_unfolding(file: Path | io.BytesIO, place: Path | str) -> None:
    """Check a file in one of PyTorch's formats.

    Raises:
        FastViTError: it is compressed, lists the same bytes several times, or asks for memory
            that nothing in the file fills. PyTorch writes none of these.
    """
    with file.open('rb') if isinstance(file, Path) else io.BytesIO(file.getbuffer()) as opened:
        size = opened.seek(0, io.SEEK_END)
        opened.seek(0)
        if opened.read(4) == b'PK\x03\x04' and unfolds(opened, size):
            raise FastViTError(
                f'{place} is larger in memory than on the disk (compressed): refused; '
                'load it where it comes from, and save it again with torch.save'
            )
        if asks_for_memory(opened, size):
            raise FastViTError(
                f'{place} contains a bytearray, which could ask for any amount of memory: '
                'refused; save only its state_dict with torch.save'
            )


def unfolds(file: io.IOBase, size: int) -> bool:
    """Whether the entries of a zip file are more than its bytes."""
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return False  # torch says what is wrong
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    return not stored or sum(max(e.file_size, e.compress_size) for e in entries) > size


def asks_for_memory(file: io.IOBase, size: int) -> bool:
    if not size:
        return False
    if isinstance(file, io.BytesIO):
        return FILLER.search(file.getbuffer()) is not None
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return FILLER.search(content) is not None
