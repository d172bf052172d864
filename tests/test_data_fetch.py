"""Downloads are checked and whole, or nothing is kept and the message says what to do; all against a local server."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from peft_combo.data.readers.download import LOCK, REMOTE, Remote, RemoteFile, fetch, get
from peft_combo.errors import DataError


class Shop:
    """What the local server serves, and how often it was asked."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.files = {"a.csv": b"item_id,title\n1,Shirt\n", "b.csv": b"bundle_id,item_id\n1,1\n"}
        self.asked: list[str] = []
        self.cut_short = False

    def remote(self, **sha256: str | None) -> Remote:
        files = (RemoteFile(f"{name}.csv", f"{self.address}/{name}.csv", sha256.get(name)) for name in ("a", "b"))
        return Remote("toys", "a test", "none", tuple(files))


@pytest.fixture
def shop() -> Iterator[Shop]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/")
            served.asked.append(name)
            content = served.files.get(name)
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 10 * served.cut_short))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Shop(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def leftovers(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.name.endswith(".part")]


def test_first_download_is_locked_and_kept(shop: Shop, tmp_path: Path) -> None:
    folder = fetch(shop.remote(a=sha256(shop.files["a.csv"])), tmp_path)
    assert folder == tmp_path / "toys"
    assert (folder / "a.csv").read_bytes() == shop.files["a.csv"]
    lock = json.loads((folder / LOCK).read_text("utf-8"))
    assert lock["sha256"] == {name: sha256(content) for name, content in shop.files.items()}
    fetch(shop.remote(), tmp_path)
    assert shop.asked == ["a.csv", "b.csv"]  # the second time nothing was asked
    assert leftovers(folder) == []


def test_file_that_changed_on_disk_is_refused(shop: Shop, tmp_path: Path) -> None:
    folder = fetch(shop.remote(), tmp_path)
    (folder / "b.csv").write_bytes(b"altered")
    with pytest.raises(DataError, match="is not the file it was"):
        fetch(shop.remote(), tmp_path)


def test_file_that_changed_at_its_source_is_refused(shop: Shop, tmp_path: Path) -> None:
    folder = fetch(shop.remote(), tmp_path)
    (folder / "b.csv").unlink()
    shop.files["b.csv"] = b"altered"
    with pytest.raises(DataError, match="did not give the expected file") as refusal:
        fetch(shop.remote(), tmp_path)
    assert sha256(b"altered") in str(refusal.value)
    assert not (folder / "b.csv").exists()
    assert leftovers(folder) == []


def test_pinned_checksum_is_checked_before_anything_is_kept(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did not give the expected file"):
        fetch(shop.remote(a="0" * 64), tmp_path)
    assert not (tmp_path / "toys" / "a.csv").exists()
    assert leftovers(tmp_path / "toys") == []


def test_connection_cut_short(shop: Shop, tmp_path: Path) -> None:
    shop.cut_short = True
    with pytest.raises(DataError, match=r"Cannot get a.csv"):
        fetch(shop.remote(), tmp_path, timeout=5)
    assert not (tmp_path / "toys" / "a.csv").exists()
    assert leftovers(tmp_path / "toys") == []


def test_missing_file_names_what_to_place_where(shop: Shop, tmp_path: Path) -> None:
    del shop.files["b.csv"]
    with pytest.raises(DataError) as refusal:
        fetch(shop.remote(), tmp_path)
    message = str(refusal.value)
    assert "Cannot get b.csv from 127.0.0.1" in message
    assert f"place them in {tmp_path / 'toys'}" in message
    assert f"{shop.address}/b.csv" in message
    assert f"{shop.address}/a.csv" not in message  # that one is there already


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    remote = Remote("toys", "a test", "none", (RemoteFile("a.csv", f"http://127.0.0.1:{port}/a.csv"),))
    with pytest.raises(DataError, match=r"Cannot get a.csv from 127.0.0.1:\d+: .*refused"):
        fetch(remote, tmp_path)


def test_files_placed_by_hand_need_no_network(tmp_path: Path) -> None:
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "a.csv").write_bytes(b"by hand")
    remote = Remote("toys", "a test", "none", (RemoteFile("a.csv", "http://127.0.0.1:9/a.csv"),))
    assert fetch(remote, tmp_path) == tmp_path / "toys"
    lock = json.loads((tmp_path / "toys" / LOCK).read_text("utf-8"))
    assert lock["sha256"] == {"a.csv": sha256(b"by hand")}


def test_broken_lock(tmp_path: Path) -> None:
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / LOCK).write_text("{", "utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        fetch(Remote("toys", "a test", "none", ()), tmp_path)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='Did you mean "bundlerec-clothing"'):
        get("bundlerec-cloth", tmp_path)


def test_registry_is_sound() -> None:
    for remote in REMOTE:
        names = [file.name for file in remote.files]
        assert len(set(names)) == len(names)
        assert all(file.url.startswith("https://") and file.url.endswith(file.name) for file in remote.files)
        assert all(file.sha256 is None or len(file.sha256) == 64 for file in remote.files)
        assert remote.terms
