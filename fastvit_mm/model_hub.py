"""Our classifiers in mmpretrain's hub: ``mmpretrain.list_models('*fastvit*')``, ``get_model``."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

HUB = 'mmpretrain.apis.model'


class AfterImport(MetaPathFinder):
    """Adds our models when mmpretrain's hub is imported, which takes too long to do it here."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != HUB:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                add(module.ModelHub)

            spec.loader.exec_module = exec_module
        return spec


def add(hub: type) -> None:
    """Let ``hub`` also read our metafile when it reads its own: when it is first asked."""
    read_own = hub._register_mmpretrain_models

    def read_all():
        from .configs import folder, list_models

        read_own()
        if not any(hub.has(name) for name in list_models()):
            metafile = folder() / 'classification' / 'metafile.yml'
            hub.register_model_index(metafile, config_prefix=folder().parent)

    hub._register_mmpretrain_models = staticmethod(read_all)


def install() -> None:
    """Make mmpretrain know our models; calling it twice has no further effect."""
    finders = [finder for finder in sys.meta_path if isinstance(finder, AfterImport)]
    if HUB not in sys.modules:
        sys.meta_path[:0] = [] if finders else [AfterImport()]
        return
    hub = sys.modules[HUB].ModelHub
    if hub._register_mmpretrain_models.__module__ != __name__:
        add(hub)
