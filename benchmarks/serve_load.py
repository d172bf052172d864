"""How much the service answers: requests a second and latency at 1, 8 and 32 clients, on loopback.

    PEFT_COMBO_DATA=PATH python benchmarks/serve_load.py     # the Online Retail catalogue: PATH/online_retail
    python benchmarks/serve_load.py --demo                   # the demo that comes with the package

The service runs as `peft-combo serve` does, a process of its own; the clients are another, over kept-alive
connections, each sending its next request when it has the answer. Asked are known users (recommend), baskets (complete,
compose), texts that were never asked before (search), embeddings; the last also of sentence-transformers with the
same encoder behind a plain FastAPI route, in the same run. Each line is a run of --seconds; a few do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from _peer import load_sentence_transformer
from _served import run_service
from _smoke import add_smoke

from peft_combo.data.sources import open_dataset
from peft_combo.recipe.files import load_recipe

warnings.simplefilter("ignore")
_WORDS = ("red", "blue", "glass", "paper", "vintage", "heart", "bird", "garden", "metal", "candle", "lunch", "cake")
_SPAWN = multiprocessing.get_context("spawn")
Bodies = Callable[[int], dict[str, Any]]


@dataclass
class Result:
    """What one run of clients saw; seconds per answer, and answers by status."""

    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    took: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("PEFT_COMBO_DATA"))
    parser.add_argument("--demo", action="store_true", help="the built-in demo in place of Online Retail")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--encoder", default="torch", help="torch, onnx, int8 or pruned, as `peft-combo serve` takes it"
    )
    parser.add_argument("--cache", type=Path, help="folder of vectors and fitted recommenders that are kept")
    parser.add_argument("--url", help="of a service that runs already, in place of one of our own")
    parser.add_argument("--json", type=Path, help="write all lines here")
    add_smoke(parser)
    options = parser.parse_args()
    if options.smoke:
        options.clients, options.seconds = [1, 4], 0.2
    lines = []
    print(f"{'asked':34} {'clients':>7} {'req/s':>8} {'p50':>8} {'p95':>8} {'p99':>8} ms  errors")
    users = list_users(options)
    with start(options) as url:
        for name, path, bodies in list_questions(url, users, options.smoke):
            lines += [report(name, n, load(url, path, bodies, n, options.seconds)) for n in options.clients]
    if not options.smoke:
        with start_peer() as url:
            for clients in options.clients:
                result = load(url, "/embed", lambda n: {"input": make_text(n)}, clients, options.seconds)
                lines.append(report("embeddings, sentence-transformers", clients, result))
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")
    if any(line["errors"] for line in lines):
        sys.exit("some requests had no answer")


@contextmanager
def start(options: argparse.Namespace) -> Iterator[str]:
    """Give the URL of the service that is measured."""
    if options.url is not None:
        yield options.url
        return
    if options.smoke:
        from _scripted import run_scripted

        with run_scripted() as url:
            yield url
        return
    if not options.demo and options.data_root is None:
        sys.exit("name the folder of the data by --data-root or PEFT_COMBO_DATA, or say --demo")
    recipe = ["lora-fashion"] if options.demo else ["lora-home", "--data", str(options.data_root / "online_retail")]
    with tempfile.TemporaryDirectory(prefix="load-") as scratch:
        kept = options.cache or Path(scratch)
        command = [
            sys.executable, "-m", "peft_combo", "serve", "--recipe", *recipe, "--port", "0",
            "--state", f"{scratch}/state", "--cache", str(kept / "vectors"),
            "--fitted", str(kept / "fitted"), "--workers", str(options.workers),
            "--encoder", options.encoder,
        ]  # fmt: skip
        with run_service(command) as (url, _):
            yield url


def list_questions(url: str, users: Sequence[str], smoke: bool) -> list[tuple[str, str, Bodies]]:
    """Return names, paths and bodies by number, over items and users that are there; `users` in an order by chance."""
    examples = httpx.get(f"{url}/v1/examples", timeout=60).json()
    items = [one["item_id"] for one in httpx.get(f"{url}/v1/items?limit=1000", timeout=60).json()["results"]]
    busiest = [one["user"] for one in examples["users"]]
    users = users or busiest
    baskets = [[item["item_id"] for item in one["items"]] for one in examples["baskets"]]

    def make_basket(number: int) -> list[str]:
        return baskets[number % len(baskets)] if number % 2 else random.Random(number).sample(items, 2)

    return [
        ("recommend, known users", "/v1/recommend", lambda n: {"user": users[n % len(users)], "k": 10}),
        ("recommend, busiest users", "/v1/recommend", lambda n: {"user": busiest[n % len(busiest)], "k": 10}),
        ("complete, baskets of two", "/v1/complete", lambda n: {"items": make_basket(n), "k": 10}),
        ("compose, baskets of two", "/v1/compose", lambda n: {"items": make_basket(n), "k": 3}),
        ("search, new texts", "/v1/search", lambda n: {"query": make_text(n), "k": 10}),
        ("search, twenty texts", "/v1/search", lambda n: {"query": make_text(n % 20), "k": 10}),
        ("embeddings", "/v1/embeddings", lambda n: {"input": make_text(n)}),
    ][: 3 if smoke else None]


def list_users(options: argparse.Namespace) -> list[str]:
    """Return the users of the data that is served, in an order by chance; none where somebody else serves."""
    if options.url is not None or options.smoke:
        return []
    recipe, data = ("lora-fashion", None) if options.demo else ("lora-home", str(options.data_root / "online_retail"))
    events = open_dataset(load_recipe(recipe, (), data).data, "interactions").interactions
    users = [] if events is None else list(events.user_ids)
    random.Random(0).shuffle(users)
    return users


def make_text(number: int) -> str:
    """Return a text of six words, another for each number."""
    dice = random.Random(number)
    return " ".join([*dice.sample(_WORDS, 5), str(number)])


def load(url: str, path: str, bodies: Bodies, clients: int, seconds: float) -> Result:
    """Ask for some seconds from so many connections at once."""
    for number in range(clients):  # the first of a kind is slower: it is not what is asked here
        httpx.post(f"{url}{path}", json=bodies(10**6 + number), timeout=60)
    result = Result()
    clock = time.perf_counter()
    asyncio.run(_ask_all(url, path, bodies, clients, clock + seconds, result))
    result.took = time.perf_counter() - clock
    return result


async def _ask_all(url: str, path: str, bodies: Bodies, clients: int, end: float, result: Result) -> None:
    match = re.fullmatch(r"http://([^:/]+):(\d+)/?", url)
    assert match is not None
    host, port = match[1], int(match[2])
    numbers = iter(range(random.randrange(10**9), 10**10))
    async with asyncio.timeout(end - time.perf_counter() + 60), asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(_ask(host, port, path, bodies, numbers, end, result))


async def _ask(
    host: str, port: int, path: str, bodies: Bodies, numbers: Iterator[int], end: float, result: Result
) -> None:
    """One client: HTTP by hand, so that asking costs little beside answering."""
    reader, writer = await asyncio.open_connection(host, port)
    while (sent := time.perf_counter()) < end:
        body = json.dumps(bodies(next(numbers))).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length is not None, head
        await reader.readexactly(int(length[1]))
        result.seconds.append(time.perf_counter() - sent)
        status = int(head[9:12])
        result.statuses[status] = result.statuses.get(status, 0) + 1
    writer.close()


def report(name: str, clients: int, result: Result) -> dict[str, Any]:
    """Print one line, and return it."""
    ordered = sorted(result.seconds)
    at = {p: 1000 * ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] for p in (50, 95, 99)}
    errors = sum(count for status, count in result.statuses.items() if status != 200)
    rate = len(ordered) / result.took
    print(f"{name:34} {clients:7} {rate:8.1f} {at[50]:8.2f} {at[95]:8.2f} {at[99]:8.2f}     {errors or ''}", flush=True)
    return {"name": name, "clients": clients, "rate": rate, **{f"p{p}": ms for p, ms in at.items()}, "errors": errors}


# --- the peer


@contextmanager
def start_peer() -> Iterator[str]:
    """Serve sentence-transformers behind a plain FastAPI route, as most would write it."""
    ready = _SPAWN.Queue()
    process = _SPAWN.Process(target=_serve_peer, args=(ready,), daemon=True)
    process.start()
    try:
        yield ready.get(timeout=300)
    finally:
        process.terminate()
        process.join(20)


def _serve_peer(ready: Any) -> None:
    import socket

    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    from peft_combo import Backbone

    backbone = Backbone.load()
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        model = load_sentence_transformer(backbone, folder)

    class Asked(BaseModel):
        input: str

    app = FastAPI()

    def embed(body: Asked) -> dict[str, Any]:
        return {"data": [{"embedding": model.encode([body.input], normalize_embeddings=True)[0].tolist()}]}

    embed.__annotations__["body"] = Asked
    app.post("/embed")(embed)
    bound = socket.create_server(("127.0.0.1", 0))
    ready.put(f"http://127.0.0.1:{bound.getsockname()[1]}")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])


if __name__ == "__main__":
    main()
