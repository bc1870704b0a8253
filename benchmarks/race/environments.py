"""Throw-away environments for the peers: made from the running interpreter, with its torch, and what a peer adds.

A peer's own requirements (an older protobuf, typer, packaging ...) are installed into its environment alone and come
first there; torch, transformers, peft and numpy are those of the running environment, which is what makes the race fair
and the set-up short.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

PEERS = {
    "flower": (("flwr[simulation]>=1.41,<1.43",), ("flwr", "ray")),
    "pfl": (("pfl[pytorch]>=0.6,<0.7",), ("pfl",)),
}
SHARED = ("torch", "transformers", "peft", "numpy")
_REPORT = """
import json, sys
from importlib.metadata import version
import importlib
found = {name: version(name) for name in sys.argv[1:]}
found["torch_from"] = importlib.import_module("torch").__file__
importlib.import_module(sys.argv[1])
print(json.dumps(found))
"""


def environment(peer: str, folder: Path) -> tuple[Path, dict[str, str]]:
    """Return a peer's interpreter and the versions in its environment, which is made if it is not there.

    Raises
    ------
    RuntimeError : the peer cannot be installed, or would run on another torch than ours.
    """
    home = folder / peer
    python = home / "bin" / "python"
    requirements, distributions = PEERS[peer]
    if not (home / "complete").exists():
        print(f"installing {', '.join(requirements)} into {home}", file=sys.stderr, flush=True)
        _run([sys.executable, "-m", "venv", "--clear", str(home)])
        site = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        (Path(site) / "zz_parent.pth").write_text(sysconfig.get_path("purelib") + "\n")  # comes after its own packages
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
        (home / "complete").touch()
    versions = json.loads(_run([str(python), "-c", _REPORT, *distributions, *SHARED]).splitlines()[-1])
    ours = json.loads(_run([sys.executable, "-c", _REPORT, *SHARED]).splitlines()[-1])
    if different := {name for name in ours if ours[name] != versions[name]}:
        raise RuntimeError(f"{peer}: another {', '.join(sorted(different))} than ours; remove {home} and try again")
    del versions["torch_from"]  # it was compared; as a path of this machine it belongs in no result
    return python, versions


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])} ...: {done.stderr.strip()[-600:]}")
    return done.stdout
