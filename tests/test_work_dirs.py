"""A run's folder: whose it is, and what in it is resumed."""

import pytest
import torch

from fastvit_mm import FastViTError
from fastvit_mm.running import work_dir


def checkpoint(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({}, path)
    return path


def hint(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'last_checkpoint').write_text(str(text))
    return folder


@pytest.mark.parametrize(
    'text', ['s3://bucket/run/epoch_3.pth', 'out/run/epoch_3.pth', 'model_3.pth', '{}/a/b.pth']
)
def test_a_hint_names_any_place(tmp_path, monkeypatch, text):
    """An address, a folder of its own (``out_dir``) relative to where the run began, any name."""
    monkeypatch.chdir(tmp_path)
    run, text = tmp_path / 'run', text.format(tmp_path)
    place = run / text if '/' not in text else tmp_path / text
    if '://' not in text:
        checkpoint(place)
    checkpoint(run / 'epoch_1.pth')
    found = work_dir.latest(hint(run, text))
    assert found == (text if '://' in text else place)


@pytest.mark.parametrize('text', ['epoch_3.pth', '/gone/epoch_3.pth', 'out/run/epoch_3.pth', 'x'])
def test_a_checkpoint_that_is_gone_is_no_new_run(tmp_path, monkeypatch, text):
    """Another run's, where the tool happens to be called, does not stand in for it."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / 'epoch_9.pth')
    run = hint(tmp_path / 'run', text)
    with pytest.raises(FastViTError, match=rf"'{text}', which is missing .*--resume FILE"):
        work_dir.latest(run)
    checkpoint(run / 'iter_1.pth')
    assert work_dir.latest(run) == run / 'iter_1.pth'


@pytest.mark.parametrize('text', [None, '', ' \n'])
def test_an_empty_work_dir_is_a_new_run(tmp_path, text):
    if text is not None:
        hint(tmp_path, text)
    assert work_dir.latest(tmp_path) is None
    assert work_dir.latest(tmp_path / 'none') is None


@pytest.mark.parametrize('text', ['\0', 'a\0/b.pth', 'x/' * 3000, 'long' * 3000, '.', '..', '/'])
def test_a_hint_of_garbage(tmp_path, text):
    checkpoint(tmp_path / 'epoch_1.pth')
    assert work_dir.latest(hint(tmp_path, text)) == tmp_path / 'epoch_1.pth'


def test_a_missing_hint_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(work_dir, 'print_log', lambda text, *_: said.append(text))
    said = []
    checkpoint(tmp_path / 'epoch_1.pth')
    assert work_dir.latest(tmp_path) == tmp_path / 'epoch_1.pth'
    assert 'last_checkpoint is missing or names no checkpoint' in said[0]
