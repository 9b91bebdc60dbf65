"""neulig_fast: merge fine-tuned networks so that the merge performs like their ensemble.

Names are imported when they are first used, and torch with them: ``neulig-fast --help`` need not
wait for it. What there is stands in ``__init__.pyi``.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lazy_loader

try:
    __version__ = version("neulig-fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"

_ROOT = Path(__file__).resolve().parent.parent
if not (_ROOT / "neulig_fast" / "kernels").exists() and (_ROOT / "kernels/__init__.py").exists():
    # A source tree: kernels/ stands beside the package and is mapped into it when installed.
    __path__.append(str(_ROOT))

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

if "torch" in sys.modules:
    # Whoever has torch expects torch.ops.neulig_fast after this import, and waits for nothing.
    import_module(".ops", __name__)
