"""Triton kernels, one file per op: a launcher of the op's name, and ``why_not``."""

if __name__ != "neulig_fast.kernels":
    raise ImportError(
        f"this folder is the package neulig_fast.kernels and was imported as {__name__!r}: "
        "a second copy would compile every kernel twice and hide other packages of that name"
    )
