"""``_base_ = 'fastvit_mm::...'``: configs of other projects may inherit from those in the wheel."""

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE


def config_path(path: str, filename: str, original=Config._get_cfg_path) -> tuple[str, str | None]:
    """mmengine's, but for the scope: ``fastvit_mm::`` says where a config lies, not which package
    has its models. mmengine would look for all of them in fastvit_mm."""
    found, scope = original(path, filename)
    return found, None if scope == 'fastvit_mm' else scope


def install() -> None:
    """Make mmengine find ``fastvit_mm::``; harmless when done twice."""
    # The name of a module in the package, not of the package: for an editable install mmengine
    # 0.10.7 would else look in site-packages.
    MODULE2PACKAGE.setdefault('fastvit_mm', 'fastvit_mm.errors')
    Config._get_cfg_path = staticmethod(config_path)
