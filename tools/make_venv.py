"""Make a virtual environment with torch: the calling interpreter's own when it has one.

    python tools/make_venv.py FOLDER

Needs nothing but the standard library. torch is the one large download; an interpreter that
already has a recent enough one lends it through a .pth file. FOLDER/constraints.txt then says what
the rest of the installation must keep to.
"""

import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (2, 11)


def own_torch() -> Path | None:
    """The folder this interpreter's torch is installed in, when it is recent enough."""
    try:
        torch = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.version)[:2])
    return Path(str(torch.locate_file(""))).resolve() if numbers >= OLDEST else None


def main(folder: Path) -> None:
    if Path(sys.prefix).resolve() == folder.resolve():
        sys.exit(f"{folder} is made afresh, but {sys.executable} runs from it: use another Python")
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    lender = own_torch()
    if lender is not None:
        Path(site, "torch_of_the_base_interpreter.pth").write_text(f"{lender}\n")
        own = {name.lower() for name in importlib.metadata.packages_distributions()}
        constraints = [c for c in constraints if c.split("==")[0].lower() not in own]
        print(f"using torch {importlib.metadata.version('torch')} from {lender}")
    (folder / "constraints.txt").write_text("\n".join(constraints) + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "-c", folder / "constraints.txt"]
    needed = ["setuptools>=77.0.3,<82", "ninja"] + ([] if lender else ["torch", "torchvision"])
    print(f"installing {', '.join(needed)}", flush=True)
    subprocess.check_call([*install, *needed])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
