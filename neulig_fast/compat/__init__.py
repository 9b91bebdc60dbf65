"""Drop-ins for other projects, a file each; :func:`neulig_fast.patch` puts them in place."""

from ._patch import Patch, patch

__all__ = ["Patch", "patch"]
