"""`airtune deploy init`: files that an independent verifier accepts, secrets for their owner, all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

from airtune import cli
from airtune.deploy.init import folder as folder_module

pytest.importorskip("cryptography", reason="comes with the extra airtune[flower]")


def init(*options: str) -> int:
    return cli.main(["deploy", "init", *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deployment") / "d"
    assert init(str(path), "--nodes", "11", "--host", "edge.example.org,192.0.2.7") == 0
    return path


def handshake(server: Path, authority: Path, host: str) -> None:
    """Run TLS between two contexts in memory; raises what the client finds wrong."""
    inside, outside = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    trust = ssl.create_default_context(cafile=authority)
    trust.verify_flags |= ssl.VERIFY_X509_STRICT
    server_side = context.wrap_bio(inside, outside, server_side=True)
    client_side = trust.wrap_bio(outside, inside, server_hostname=host)
    for _ in range(4):
        for side in (client_side, server_side):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()


@pytest.mark.parametrize("host", ["edge.example.org", "192.0.2.7", "localhost", "127.0.0.1", "::1"])
def test_the_server_is_trusted_under_each_of_its_names(made: Path, host: str) -> None:
    handshake(made, made / "ca.crt", host)


def test_another_name_and_another_authority_are_not_trusted(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(made, made / "ca.crt", "evil.example.org")
    assert init(str(tmp_path / "other"), "--host", "edge.example.org") == 0
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, tmp_path / "other" / "ca.crt", "edge.example.org")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_openssl_verifies_the_chain_and_the_server_cannot_sign(made: Path) -> None:
    def run(*words: str) -> str:
        done = subprocess.run(["openssl", *words], cwd=made, capture_output=True, text=True, timeout=30)
        return done.stdout + done.stderr

    assert run("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca.crt", "server.crt").endswith("OK\n")
    authority = run("x509", "-in", "ca.crt", "-noout", "-text")
    assert "CA:TRUE, pathlen:0" in authority and "Certificate Sign" in authority
    assert "CA:FALSE" in run("x509", "-in", "server.crt", "-noout", "-text")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")
def test_node_keys_are_openssh_keys_and_all_different(made: Path) -> None:
    found = set()
    for node in sorted((made / "nodes").iterdir()):
        words = ["ssh-keygen", "-y", "-P", "", "-f", str(node / "node.key")]
        derived = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
        assert derived.split()[:2] == (node / "node.pub").read_text().split()[:2]
        assert derived.startswith("ecdsa-sha2-nistp384 ")
        found.add(derived)
    assert len(found) == 11


def test_secrets_are_for_their_owner_alone(made: Path) -> None:
    private = [path for path in made.rglob("*.key")]
    assert len(private) == 11 + 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for path in made.rglob("*"):
        assert path.suffix == ".key" or path.is_dir() or b"PRIVATE KEY" not in path.read_bytes(), path


def test_a_node_folder_holds_what_its_device_needs_and_no_more(made: Path) -> None:
    for index, node in enumerate(sorted((made / "nodes").iterdir())):
        assert node.name == f"node-{index:02d}"
        assert {path.name for path in node.iterdir()} == {"ca.crt", "node.key", "node.pub", "start.sh"}
        assert f"partition-id={index} num-partitions=11" in (node / "start.sh").read_text()


def test_scripts_are_shell_and_secure(made: Path, tmp_path: Path) -> None:
    scripts = [*made.glob("*.sh"), *made.glob("nodes/*/start.sh")]
    assert len(scripts) == 13
    for script in scripts:
        subprocess.run(["sh", "-n", str(script)], check=True, timeout=30)
        assert "--insecure" not in script.read_text() and os.access(script, os.X_OK)
    text = (made / "start-superlink.sh").read_text()
    assert "--enable-supernode-auth" in text and "--host 0.0.0.0" in text
    config = tomllib.loads((made / "flwr" / "config.toml").read_text())["superlink"]
    assert config["airtune"] == {"address": "edge.example.org:8000", "root-certificates": str(made / "ca.crt")}
    assert init(str(tmp_path / "here")) == 0
    assert "--host 127.0.0.1" in (tmp_path / "here" / "start-superlink.sh").read_text()


def test_insecure_must_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(str(tmp_path / "d"), "--insecure", "--json") == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["secure"] is False
    assert not list((tmp_path / "d").rglob("*.key")) and not list((tmp_path / "d").rglob("*.crt"))
    assert "--insecure" in (tmp_path / "d" / "start-superlink.sh").read_text()
    assert "--enable-supernode-auth" not in (tmp_path / "d" / "start-superlink.sh").read_text()
    assert tomllib.loads((tmp_path / "d/flwr/config.toml").read_text())["superlink"]["airtune"]["insecure"] is True
    assert "No encryption" in (tmp_path / "d" / "README.md").read_text()
    assert init(str(tmp_path / "e"), "--insecure") == 0
    assert "no encryption and no authentication" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["full"], "is not empty"),
        (["file"], "is no folder"),
        (["link"], "is no folder"),
        (["new", "--nodes", "0"], "--nodes: 0"),
        (["new", "--nodes", "two"], "--nodes: cannot read 'two'"),
        (["new", "--port", "70000"], "--port: 70000"),
        (["new", "--host", "a b"], "--host: 'a b'"),
        (["new", "--host", "*.example.org"], "is no host"),
        (["new", "--host", "$(reboot)"], "is no host"),
        (["new", "--host", ","], "--host: is empty"),
        (['a"b'], "has a quote"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert init(*options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "d"
    target.mkdir()
    real = folder_module._write

    def fails(path: Path, content: bytes, mode: int) -> None:
        if path.name == "start.sh" and "node-1" in str(path):
            raise OSError(28, "No space left on device")
        real(path, content, mode)

    monkeypatch.setattr(folder_module, "_write", fails)
    assert init(str(target)) == 3
    assert "the disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [target] and not list(target.iterdir())
    monkeypatch.setattr(folder_module, "_write", real)
    assert init(str(target)) == 0
    assert (target / "nodes" / "node-1" / "start.sh").exists()
