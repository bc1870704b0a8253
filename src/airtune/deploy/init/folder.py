"""Writing the folder of a deployment: all of it or nothing, private keys for their owner alone."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from airtune.deploy.init.certificates import check_host, check_library, make_certificates, make_node_key
from airtune.deploy.init.scripts import (
    Layout,
    flower_config,
    node_script,
    readme,
    register_script,
    superlink_script,
)
from airtune.errors import InputError
from airtune.files import disk_errors, sync_folder

MOST_NODES = 10_000
SECRET, PLAIN, SCRIPT = 0o600, 0o644, 0o755

File = tuple[str, bytes, int]  # path in the folder, content, mode


def write_deployment(layout: Layout) -> Path:
    """Write a deployment and return its folder.

    Raises
    ------
    InputError : the folder is not empty, or a number or name is not possible. MissingPackageError : without the package
        cryptography there are no keys. NoResultError : the disk is full or not writable; nothing is left behind.
    """
    _check(layout)
    if layout.secure:
        check_library()
    target = layout.folder
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))  # mode 0700
        try:
            for name, content, mode in _files(layout):
                _write(building / name, content, mode)
            _sync(building)
            os.replace(building, target)  # takes the place of an empty folder, never of one with files
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        sync_folder(target.parent)
    return target


def _check(layout: Layout) -> None:
    if not 1 <= layout.nodes <= MOST_NODES:
        raise InputError(f"--nodes: {layout.nodes} is not possible; valid: 1 to {MOST_NODES}")
    if not 1 <= layout.port <= 65535:
        raise InputError(f"--port: {layout.port} is no port; valid: 1 to 65535")
    for host in layout.hosts:
        check_host(host)
    target = layout.folder
    if any(letter in str(target) for letter in '"\\\n'):
        raise InputError(f"{target}: has a quote, backslash or line break; valid: another name")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target}: is no folder; valid: a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target}: is not empty; valid: a new folder")


def _files(layout: Layout) -> Iterator[File]:
    yield "README.md", readme(layout).encode(), PLAIN
    yield "start-superlink.sh", superlink_script(layout).encode(), SCRIPT
    yield "flwr/config.toml", flower_config(layout).encode(), PLAIN
    names = [layout.node_name(index) for index in range(layout.nodes)]
    for index, name in enumerate(names):
        yield f"nodes/{name}/start.sh", node_script(layout, index).encode(), SCRIPT
    if layout.secure:
        yield "register-nodes.sh", register_script(layout).encode(), SCRIPT
        yield from _secrets(layout, names)


def _secrets(layout: Layout, names: list[str]) -> Iterator[File]:
    authority, server = make_certificates(layout.hosts)
    yield "authority.key", authority.private, SECRET
    yield "ca.crt", authority.public, PLAIN
    yield "server.key", server.private, SECRET
    yield "server.crt", server.public, PLAIN
    for name in names:
        key = make_node_key()
        yield f"nodes/{name}/ca.crt", authority.public, PLAIN
        yield f"nodes/{name}/node.key", key.private, SECRET
        yield f"nodes/{name}/node.pub", key.public, PLAIN


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    for place, _, _ in os.walk(folder):
        sync_folder(Path(place))
