"""What becomes of the service when things go wrong: kills, a full disk, broken adapters, bad and slow clients.

    python benchmarks/serve_faults.py               # 200 kills, some ten minutes
    python benchmarks/serve_faults.py --kills 1000

A service with a tiny shop runs on loopback, in a process forked from this one, so that a start costs a second. Kills:
four clients put items, send events and promote without pause; at a random moment the process gets SIGKILL, is started
again, and every write it had acknowledged has to be in its state and its answers. Each other fault has its own answer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from _scripted import run_scripted
from _served import Served, make_served
from _smoke import add_smoke

warnings.simplefilter("ignore")
_FORK = multiprocessing.get_context("fork")


class Running:
    """A service in a process of its own, and the address it answers at."""

    def __init__(self, served: Served, state: Path, limit: int | None = None, **settings: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        values = served.settings(state, port=self.port, open=["read", "write", "admin"], **settings)
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = _FORK.Process(target=_serve, args=(values, limit), daemon=True)
        self.process.start()
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200:
                    return
            if not self.process.is_alive():
                raise SystemExit(f"The service ended with code {self.process.exitcode} at its start.")
            time.sleep(0.02)
        raise SystemExit("The service was not ready within two minutes.")

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()

    def end(self) -> int | None:
        self.process.terminate()
        self.process.join(30)
        return self.process.exitcode


def _serve(values: dict[str, Any], limit: int | None) -> None:
    from peft_combo.serving.config import make_config
    from peft_combo.serving.processes import serve
    from peft_combo.serving.service import Service

    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    serve(make_config(values), lambda note: None, lambda lines: None, Service.open)


@contextmanager
def running(served: Served, state: Path, **settings: Any) -> Iterator[Running]:
    service = Running(served, state, **settings)
    try:
        yield service
    finally:
        if service.process.is_alive():
            service.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    add_smoke(parser)
    options = parser.parse_args()
    if options.smoke:
        smoke()
        return
    failed = False
    with make_served() as served, tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        with running(served, Path(scratch) / "first"):
            pass  # imports and fits once; what is forked from now on finds both done
        import peft_combo.serving.service  # noqa: F401

        kills = options.kills
        tests: list[tuple[str, Callable[[Served, Path], str]]] = [
            (f"{kills} kills", lambda s, f: kill_often(s, f, kills, options.seed)),
            ("a full disk", fill_disk), ("a broken adapter", break_adapter), ("slow clients", be_slow),
            ("bad bodies and keys", send_nonsense), ("concurrent upserts", put_at_once),
        ]  # fmt: skip
        print(f"{'fault':22}  verdict")
        for number, (name, act) in enumerate(tests):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            try:
                verdict = act(served, folder)
            except AssertionError as error:
                verdict, failed = f"FAIL: {error}", True
            print(f"{name:22}  {verdict}", flush=True)
    sys.exit(int(failed))


def smoke() -> None:
    """Go through what needs no encoder, with an engine that answers by a script."""
    with run_scripted() as url, httpx.Client(base_url=url, timeout=30) as client:
        print(f"{'fault':22}  verdict\nbad bodies and keys     {check_nonsense(client)}")


# --- kills


class Writer(threading.Thread):
    """Writes without pause and remembers what was acknowledged."""

    def __init__(self, service: Running, name: str, kind: str) -> None:
        super().__init__(daemon=True)
        self.items: list[str] = []
        self.events: list[str] = []
        self.promoted: list[str] = []
        self._service, self._name, self._kind = service, name, kind

    def run(self) -> None:
        with suppress(httpx.HTTPError), httpx.Client(base_url=self._service.url, timeout=30) as client:
            for number in range(10_000):
                getattr(self, f"_write_{self._kind}")(client, f"{self._name}-{number}")

    def _write_items(self, client: httpx.Client, name: str) -> None:
        if client.put(f"/v1/items/{name}", json={"title": f"w10 w{30 + len(self.items) % 90}"}).status_code == 201:
            self.items.append(name)

    def _write_events(self, client: httpx.Client, name: str) -> None:
        event = {"user": f"u{len(self.events) % 30}", "item_id": "p1", "kind": "view", "event_id": name}
        if client.post("/v1/events", json={"events": [event]}).json().get("accepted") == 1:
            self.events.append(name)

    def _write_promotions(self, client: httpx.Client, name: str) -> None:
        version = f"tiny@v{1 + len(self.promoted) % 2}"
        if client.post("/v1/adapters/promote", json={"alias": "tiny@prod", "version": version}).status_code == 200:
            self.promoted.append(version)
        time.sleep(0.05)


def kill_often(served: Served, folder: Path, kills: int, seed: int) -> str:
    """Kill a writing service so often; say how many acknowledged writes there were, and that none is missing."""
    from peft_combo.serving.state import State

    dice, state = random.Random(seed), folder / "state"
    items: set[str] = set()
    events: set[str] = set()
    promotions = 0
    for number in range(kills):
        service = Running(served, state)
        kinds = ("items", "items", "events", "promotions")
        writers = [Writer(service, f"k{number}-{place}", kind) for place, kind in enumerate(kinds)]
        for writer in writers:
            writer.start()
        time.sleep(dice.uniform(0.02, 1.0))
        service.kill()
        for writer in writers:
            writer.join(30)
        items |= {name for writer in writers for name in writer.items}
        events |= {name for writer in writers for name in writer.events}
        opened = State.open(state)
        lost_items = items - {row.item_id for row in opened.items_since()}
        lost_events = events - {row.event_id for row in opened.events_since()}
        history = [row.arms["prod"].version for row in opened.deployments_since(0) if "prod" in row.arms]
        opened.close()
        promoted = [version for writer in writers for version in writer.promoted]
        promotions += len(promoted)
        assert not lost_items, f"kill {number}: {len(lost_items)} acknowledged items are lost"
        assert not lost_events, f"kill {number}: {len(lost_events)} acknowledged events are lost"
        # The last acknowledged promotion is in force, or one that was under way when the kill came.
        assert not promoted or promoted[-1] in history[-2:], f"kill {number}: promotion {promoted[-1]} is lost"
    with running(served, state) as service:
        sample = dice.sample(sorted(items), min(50, len(items)))
        missing = [name for name in sample if httpx.get(f"{service.url}/v1/items/{name}").status_code != 200]
        assert not missing, f"{len(missing)} of {len(sample)} items are stored but not served"
    return f"pass: {len(items):,} items, {len(events):,} events and {promotions:,} promotions acknowledged, 0 lost"


# --- other faults


def fill_disk(served: Served, folder: Path) -> str:
    """Let no file grow beyond a limit, as on a full disk: writes are refused in words, answers go on."""
    with running(served, folder / "state") as service:
        httpx.put(f"{service.url}/v1/items/before", json={"title": "w10 w31"})
    size = max(file.stat().st_size for file in (folder / "state").iterdir())
    with running(served, folder / "state", limit=size + 200_000) as service:
        statuses, acknowledged = set(), []
        with httpx.Client(base_url=service.url, timeout=30) as client:
            for number in range(2000):
                answer = client.put(f"/v1/items/x{number}", json={"title": "w10 w32", "note": "long " * 1000})
                statuses.add(answer.status_code)
                if answer.status_code == 201:
                    acknowledged.append(f"x{number}")
                if answer.status_code == 503:
                    break
            assert answer.headers["content-type"] == "application/problem+json", answer.text
            assert statuses <= {201, 503}, f"answers {statuses}"
            assert 503 in statuses, "the disk was never full"
            asked = client.post("/v1/complete", json={"items": ["p1"]})
            assert asked.status_code == 200, asked.text
    with running(served, folder / "state") as service:
        lost = [one for one in acknowledged if httpx.get(f"{service.url}/v1/items/{one}").status_code != 200]
        assert not lost, f"{len(lost)} acknowledged items are lost"
    return f"pass: {len(acknowledged)} writes, then 503; questions are answered; 0 lost afterwards"


def break_adapter(served: Served, folder: Path) -> str:
    """Change bytes of an adapter and promote it: it is refused, and what was in use still is."""
    store = folder / "adapters"
    shutil.copytree(served.store, store)
    with running(served, folder / "state", store=store) as service:
        weights = max((store / "tiny" / "v2").rglob("*.safetensors"), key=lambda file: file.stat().st_size)
        content = bytearray(weights.read_bytes())
        content[-8:] = b"\xff" * 8
        weights.write_bytes(bytes(content))
        with httpx.Client(base_url=service.url, timeout=60) as client:
            refused = client.post("/v1/adapters/promote", json={"alias": "tiny@prod", "version": "tiny@v2"})
            assert refused.status_code == 409, f"{refused.status_code} {refused.text}"
            origin = client.post("/v1/complete", json={"items": ["p1"]}).json()["origin"]
            assert origin["version"] == "tiny@v1", origin
    return "pass: 409, and v1 still answers"


def be_slow(served: Served, folder: Path) -> str:
    """Hold connections open with half a header and half a body: others are answered, and the slow are let go."""
    with running(served, folder / "state", body_seconds=0.5) as service:
        head = b"POST /v1/complete HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        slow = []
        for number in range(100):
            one = socket.create_connection(("127.0.0.1", service.port), 30)
            one.sendall(head + (b"Content-Length: 100\r\n\r\n{" if number % 2 else b""))
            slow.append(one)
        with httpx.Client(base_url=service.url, timeout=30) as client:
            clock = time.perf_counter()
            codes = {client.post("/v1/complete", json={"items": ["p1"]}).status_code for _ in range(20)}
            took = (time.perf_counter() - clock) / 20
        assert codes == {200}, codes
        told = slow[1].recv(100)
        assert b" 408 " in told, told
        for one in slow:
            one.close()
    return f"pass: 100 slow connections, others answered in {1000 * took:.0f} ms; a half body gets 408"


def send_nonsense(served: Served, folder: Path) -> str:
    """Send bodies and keys that are none: each has its status, in problem+json."""
    with running(served, folder / "state") as service, httpx.Client(base_url=service.url, timeout=30) as client:
        return check_nonsense(client)


def check_nonsense(client: httpx.Client) -> str:
    """Send it to a service."""
    json_type = {"Content-Type": "application/json"}
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({"content": b"{" + b" " * (2 << 20) + b"}", "headers": json_type}, {413}),
        ({"content": b"[" * 100_000, "headers": json_type}, {422}),
        ({"content": b"\x00\xff\xfe", "headers": json_type}, {422}),
        ({"content": b'{"items": ["p1"], "items": 3}', "headers": json_type}, {422}),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, {415}),
        ({"json": {"k": 10**30}}, {422}), ({"json": {"items": ["p1"] * 2000}}, {422}),
        ({"json": {"query": "x" * 20_000}}, {422}), ({"json": {"query": "\u202e\u0000"}}, {200, 400, 422}),
        ({"json": {"items": ["p1"]}, "headers": {"Authorization": "Bearer pc_wrong"}}, {401}),
        ({"json": {"items": ["p1"]}, "headers": [(b"Authorization", b"Bearer \xff\xfe")]}, {401}),
    ]  # fmt: skip
    for number, (sent, expected) in enumerate(cases):
        answer = client.post("/v1/complete", **sent)
        assert answer.status_code in expected, f"case {number}: {answer.status_code} {answer.text[:200]}"
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json", f"case {number}"
    assert client.get("/health/ready").status_code == 200
    return f"pass: {len(cases)} cases as expected"


def put_at_once(served: Served, folder: Path) -> str:
    """Put items from eight threads, some of them the same: the last word is what every answer says."""
    with running(served, folder / "state") as service:
        codes: list[int] = []

        def put(thread: int) -> None:
            with httpx.Client(base_url=service.url, timeout=60) as client:
                for number in range(20):
                    for name in (f"own-{thread}-{number}", f"same-{number}"):
                        title = f"w10 w{30 + (thread + number) % 90}"
                        codes.append(client.put(f"/v1/items/{name}", json={"title": title}).status_code)

        threads = [threading.Thread(target=put, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(codes) <= {200, 201}, set(codes)
        with httpx.Client(base_url=service.url, timeout=60) as client:
            served_now = {n: client.get(f"/v1/items/same-{n}").json()["title"] for n in range(20)}
    from peft_combo.serving.state import State

    opened = State.open(folder / "state")
    stored = {row.item_id: row.fields for row in opened.items_since()}
    opened.close()
    assert len(stored) == 8 * 20 + 20, f"{len(stored)} items are stored"
    odd = [n for n, title in served_now.items() if stored[f"same-{n}"].get("title") != title]
    assert not odd, f"{len(odd)} items are served other than they are stored"
    return f"pass: {len(codes)} upserts, {len(stored)} items, served as stored"


if __name__ == "__main__":
    main()
