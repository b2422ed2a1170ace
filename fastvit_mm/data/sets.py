"""The data sets of a config: which there are, of what class, and whether their files are here."""

from collections.abc import Iterator

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS

LOCAL = (None, 'local', 'disk')


def datasets_in(node) -> Iterator[ConfigDict]:
    """Every data set in a dataloader's config, including those in wrappers (RepeatDataset)."""
    if isinstance(node, list | tuple):
        for child in node:
            yield from datasets_in(child)
    elif isinstance(node, dict):
        inner = [node.get(key) for key in ('dataset', 'datasets')]
        inner = [one for one in inner if isinstance(one, dict | list | tuple)]
        if inner:
            yield from datasets_in(inner)
        elif 'type' in node:
            yield node


def datasets_of(cfg: Config, *stages: str) -> list[ConfigDict]:
    """Those of some stages whose files are on this machine."""
    found = [d for s in stages for d in datasets_in(cfg.get(f'{s}_dataloader'))]
    return [one for one in found if is_local(one)]


def kind_of(dataset: dict, scope: str) -> type | None:
    """The class that a config names, or gives; None if it is something else, such as a function."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        given = dataset['type']
        kind = registry.get(given) if isinstance(given, str) else given
    return kind if isinstance(kind, type) else None


def is_local(dataset) -> bool:
    """Whether a data set, built or a config, reads files by their paths on this machine.

    Storage such as LMDB or Petrel is named in ``backend_args``, of the data set or of its steps.
    """
    pipeline = setting(dataset, 'pipeline')
    steps = getattr(pipeline, 'transforms', pipeline)
    parts = [dataset, *(steps if isinstance(steps, list | tuple) else [])]
    given = [setting(one, key) for one in parts for key in ('backend_args', 'file_client_args')]
    backends = [one.get('backend') for one in given if isinstance(one, dict)]
    return '://' not in str(setting(dataset, 'data_root')) and all(b in LOCAL for b in backends)


def setting(one, key: str):
    return one.get(key) if isinstance(one, dict) else getattr(one, key, None)
