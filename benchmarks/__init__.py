"""Benchmarks: ``neulig-fast bench`` on the user's machine, ``make bench`` for the committed rows.

One file ``bench_<op>.py`` per op, whose ``cases(device, quick)`` yields what is measured; the rules
are in harness.py.
"""

import pkgutil

if __name__ != "neulig_fast.benchmarks":
    raise ImportError(
        f"this folder is the package neulig_fast.benchmarks and was imported as {__name__!r}"
    )


def names() -> list[str]:
    """What can be measured, by name."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(n.removeprefix("bench_") for n in found if n.startswith("bench_"))
