"""``_base_ = 'fastvit_mm::...'``: configs of other projects can inherit from those in the wheel."""

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE


def config_path(path: str, filename: str, original=Config._get_cfg_path) -> tuple[str, str | None]:
    """mmengine's function, except for the scope: ``fastvit_mm::`` says where a config is, not which
    package has its models. mmengine would look for all of them in fastvit_mm."""
    found, scope = original(path, filename)
    return found, None if scope == 'fastvit_mm' else scope


def install() -> None:
    """Make mmengine find ``fastvit_mm::``; calling it twice is harmless."""
    # The name of a module in the package, not of the package: otherwise mmengine 0.10.7 looks in
    # site-packages for an editable install.
    MODULE2PACKAGE.setdefault('fastvit_mm', 'fastvit_mm.errors')
    Config._get_cfg_path = staticmethod(config_path)
