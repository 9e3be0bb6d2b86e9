"""What a machine lacks of requirements.txt. Only the standard library: this runs before anything
else of the project can be imported."""

import subprocess
import sys
from importlib import metadata

NOT_NEEDED = ("jupyter", "pytest", "hypothesis")  # the notebook runs already, and tests are not run


def missing(requirements):
    """Those of ["name==1.2.3", ...] that are absent, or there with another first number."""
    found = []
    for line in requirements:
        name, _, version = line.partition("==")
        if name in NOT_NEEDED:
            continue
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = ""
        if installed.split(".")[0] != version.split(".")[0]:
            found.append(line)
    return found


def need_packages(root, install):
    """install: pip gets what is missing, as on a hosted machine; else a line says what to type."""
    lacks = missing((root / "requirements.txt").read_text().split())
    if not lacks:
        return
    if install:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *lacks], check=True)
        print("installed:", *lacks, "- if an import fails now, restart the kernel once")
    else:
        print("not as in requirements.txt:", *lacks)
        print(f"to install them: {sys.executable} -m pip install -r {root / 'requirements.txt'}")
