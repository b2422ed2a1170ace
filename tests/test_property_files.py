"""Any bytes as a weights file: no code runs, nothing hangs, and memory stays within twice the
file's size."""

import io
import pickle
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors
from test_properties import share

from fastvit_mm import FastViT, FastViTError, weights
from fastvit_mm.weights import layouts

ARCH = dict(depths=(1, 0, 0, 0), widths=(8, 8, 8, 8), ffn_ratio=1)
SECONDS = 20
SLACK = 24 << 20  # bytes that reading any small file may take: modules, caches, arenas

# What Python reports of code that does something: none of it belongs to reading weights.
FORBIDDEN = (
    *('exec', 'compile', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.remove'),
    *('os.rename', 'os.rmdir', 'os.mkdir', 'subprocess.Popen', 'socket.connect', 'ctypes.dlopen'),
    *('shutil.rmtree', 'shutil.copyfile', 'pty.spawn', 'webbrowser.open', 'ftplib.connect'),
)
WATCH = dict(on=False, seen=[])


def watch(event, args):
    if not WATCH['on'] or not (event in FORBIDDEN or (event == 'open' and writes(args))):
        return
    if not empties(args) and not imports(args):
        WATCH['seen'].append((event, str(args)[:200]))


def writes(args):
    return isinstance(args[1], str) and any(c in args[1] for c in 'wax+')


def empties(args):
    """torch makes an empty temporary folder for a tar file, before it refuses it."""
    return str(args[0]).startswith(f'{tempfile.gettempdir()}/tmp')


def imports(args):
    """A codec that zipfile needs, a module of torch: the code of a file that is installed."""
    name = getattr(args[0], 'co_filename', None) or (str(args[1]) if len(args) > 1 else '')
    return name.endswith('.py') and Path(name).is_file()


sys.addaudithook(watch)


class Trap:
    """Its pickle makes a file."""

    def __init__(self, call, *args):
        self.made = call, args

    def __reduce__(self):
        return self.made


def checkpoint():
    torch.manual_seed(0)
    state = FastViT(ARCH, out_indices=(0,)).state_dict()
    return dict(state_dict=state, meta=dict(epoch=3, dataset_meta=dict(classes=['a', 'b'])))


def saved(content, **args):
    torch.save(content, file := io.BytesIO(), **args)
    return file.getvalue()


REAL = {
    'zip': saved(checkpoint()),
    'legacy': saved(checkpoint(), _use_new_zipfile_serialization=False),
    'safetensors': to_safetensors(checkpoint()['state_dict']),
    'pickle': pickle.dumps(dict(state_dict=dict(a=[1.0, 2.0]))),
    'hostile zip': saved(dict(state_dict={}, meta=Trap(open, 'trap', 'w'))),
    'hostile legacy': saved(
        dict(state_dict={}, meta=Trap(eval, "open('trap', 'w')")),
        _use_new_zipfile_serialization=False,
    ),
    'hostile pickle': pickle.dumps(Trap(eval, "open('trap', 'w')")),
}


def peak():
    """The most memory, in bytes, that this process has held since :func:`reset_peak`."""
    status = Path('/proc/self/status').read_text()
    return int(status.partition('VmHWM:')[2].split()[0]) << 10


def reset_peak():
    Path('/proc/self/clear_refs').write_text('5')


@pytest.fixture
def limits():
    """A hang ends in an exception, and so does an allocation beyond reason."""

    def stop(*_):
        raise AssertionError(f'not read after {SECONDS} s')

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(folder, content, suffix):
    """Read ``content`` as a file in every way that users can; gives what was read, or None."""
    (path := folder / f'file{suffix}').write_bytes(content)
    reset_peak()
    base = peak()
    signal.alarm(SECONDS)
    WATCH.update(on=True, seen=[])
    found = None
    try:
        found = weights.read(path)
        layouts.to_mm(weights.state_dict_of(found, path), path)
    except FastViTError as error:
        assert str(error) and '\n' not in str(error).strip()
    finally:
        WATCH['on'] = False
        signal.alarm(0)
    assert not WATCH['seen'], WATCH['seen']
    assert not (folder / 'trap').exists()
    assert peak() - base <= 2 * len(content) + SLACK
    return found


suffixes = st.sampled_from(['.pth', '.safetensors'])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('files')


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch, limits):
    monkeypatch.chdir(folder)


def test_real_files_are_read(folder):
    for name in ('zip', 'legacy', 'safetensors'):
        found = read(folder, REAL[name], '.safetensors' if name == 'safetensors' else '.pth')
        assert weights.state_dict_of(found, name).keys() == checkpoint()['state_dict'].keys()
    for name in ('hostile zip', 'hostile legacy', 'hostile pickle'):
        assert read(folder, REAL[name], '.pth') is None
    with open('trap', 'w') as trap:  # the watch sees what it should see
        WATCH.update(on=True)
        eval("open('trap', 'w').close()")
        WATCH.update(on=False)
        trap.close()
    assert {event for event, _ in WATCH['seen']} >= {'open', 'exec'}
    Path('trap').unlink()


# The first bytes decide who reads the rest.
BEGINNINGS = [
    *(b'', b'PK\x03\x04', b'\x1f\x8b', b'\x80\x02', b'\x80\x04\x95'),
    REAL['legacy'][:40],
    struct.pack('<Q', 40) + b'{"a":{"dtype":"F32","shape":',
    struct.pack('<Q', 2**63),
]


@share(8)
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=400), suffixes)
def test_random_bytes(folder, beginning, rest, suffix):
    read(folder, beginning + rest, suffix)


@st.composite
def mutated(draw):
    """A real file, damaged or changed in a few places."""
    content = bytearray(REAL[draw(st.sampled_from(list(REAL)))])
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(['flip', 'cut', 'insert', 'repeat', 'number', 'opcode']))
        size = max(1, len(content))
        # Headers and pickles, at both ends of a file, matter more than the numbers between.
        end = st.integers(0, min(3000, size - 1))
        at = draw(end | end.map(lambda n, size=size: size - 1 - n) | st.integers(0, size - 1))
        if kind == 'flip':
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == 'cut':
            del content[at : at + draw(st.integers(1, size))]
        elif kind == 'insert':
            content[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif kind == 'repeat':
            content[at:at] = content[at : at + draw(st.integers(1, 400))]
        elif kind == 'number':  # a size or a count
            number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63]))
            content[at : at + 8] = struct.pack('<Q', number)
        else:
            content[at : at + 1] = draw(st.sampled_from([b'R', b'c', b'b', b'\x93', b'q', b'\x8a']))
    return bytes(content)


@share(8)
@given(mutated(), suffixes)
def test_mutated_files(folder, content, suffix):
    read(folder, content, suffix)


# ----------------------------------------------------------------------- files that claim or unfold


def packed(content, compression):
    """A checkpoint in a zip file whose entries are compressed."""
    source = zipfile.ZipFile(io.BytesIO(saved(content)))
    with zipfile.ZipFile(file := io.BytesIO(), 'w', compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return file.getvalue()


def overlapping():
    """A zip file whose directory lists one entry many times."""
    source = zipfile.ZipFile(io.BytesIO(saved(dict(state_dict=dict(a=torch.zeros(1 << 20))))))
    big = next(i for i in source.infolist() if i.file_size > 1 << 20)
    with zipfile.ZipFile(file := io.BytesIO(), 'w') as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        first = target.getinfo(big.filename)
        for index in range(1, 40):
            twin = zipfile.ZipInfo(big.filename.replace('/0', f'/{index}'))
            for key in ('header_offset', 'CRC', 'compress_size', 'file_size'):
                setattr(twin, key, getattr(first, key))
            target.filelist.append(twin)
            target.NameToInfo[twin.filename] = twin
    return file.getvalue()


def claims(size):
    """A pickle that asks for an array of ``size`` bytes and holds none of them."""
    return pickle.dumps(Trap(bytearray, size))


def bomb():
    zeros = dict(state_dict=dict(a=torch.zeros(50 << 20, dtype=torch.uint8)))
    return packed(zeros, zipfile.ZIP_DEFLATED)


def laughs():
    """Lists within lists: 2**60 items, were they ever counted."""
    inner = ['ha']
    for _ in range(60):
        inner = [inner, inner]
    return inner


def tar():
    with tarfile.open(fileobj=(file := io.BytesIO()), mode='w') as target:
        target.addfile(tarfile.TarInfo('storages'), io.BytesIO())
    return file.getvalue()


UNFOLDING = {
    'compressed': bomb,
    'bytearray': lambda: claims(1 << 32),
    'bytearray in a zip': lambda: saved(dict(state_dict={}, meta=Trap(bytearray, 1 << 32))),
    'lists within lists': lambda: saved(dict(state_dict=laughs())),
    'laughing meta': lambda: saved(dict(state_dict={'a': torch.ones(1)}, meta=laughs())),
    'laughing key': lambda: saved({'state_dict': {'a': torch.ones(1)}, 'meta': {'x': laughs()}}),
    'deep': lambda: b'\x80\x02' + b']' * 50000 + b'a' * 49999 + b'.',
    'tar': tar,
    'expanded': lambda: saved(dict(state_dict=dict(a=torch.zeros(1).expand(1 << 34)))),
    'ten in one': overlapping,
    'header': lambda: struct.pack('<Q', 90 << 20) + b'{}',
}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('name', UNFOLDING)
def test_files_that_unfold(folder, name, suffix):
    content = UNFOLDING[name]()
    assert len(content) < 6 << 20
    before = resource.getrlimit(resource.RLIMIT_AS)
    virtual = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (6 << 30), before[1]))
    try:
        read(folder, content, suffix)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_memory_of_a_large_file(folder, suffix):
    """Twice the size, without any slack that matters."""
    state = {f'w{i}': torch.randn(1 << 20) for i in range(25)}
    content = to_safetensors(state) if suffix == '.safetensors' else saved(dict(state_dict=state))
    assert len(content) > 4 * SLACK
    assert read(folder, content, suffix) is not None
