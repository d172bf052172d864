"""What the service answers to requests made up from its own description: none of them may be a fault.

    python benchmarks/serve_schema.py                # 10,000 cases over all routes, minutes
    python benchmarks/serve_schema.py --cases 50000

A service with a tiny shop runs as a process of its own on loopback, open for every scope. schemathesis makes
bodies, paths and queries from /openapi.json, half of them valid and half not. Counted are the answers by status; one
of 500, one of 400 or more that is no problem+json, or one without an id of the request is a fault.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import requests
from _scripted import run_scripted
from _served import make_served, run_service
from _smoke import add_smoke
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.configuration import set_hypothesis_home_dir

warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    add_smoke(parser)
    options = parser.parse_args()
    scratch = tempfile.TemporaryDirectory(prefix="schema-")
    set_hypothesis_home_dir(scratch.name)  # where it is run, nothing is to stay behind
    if options.smoke:
        with run_scripted() as url:
            statuses, faults, alive = measure(url, 60, options.seed)
    else:
        with make_served() as served, tempfile.TemporaryDirectory() as state:
            command = served.command(Path(state) / "state", "--open", "read,write,admin")
            with run_service(command) as (url, _):
                statuses, faults, alive = measure(url, options.cases, options.seed)
    print("status  answers")
    for status, count in sorted(statuses.items()):
        print(f"{status:6}  {count:7,}")
    health = "well" if alive else "DEAD"
    print(f"{sum(statuses.values()):,} cases, {len(faults)} faults; the service is {health} afterwards")
    for fault in faults[:20]:
        print(f"  {fault}")
    if faults or not alive:
        sys.exit(1)


def measure(url: str, cases: int, number: int) -> tuple[Counter[int], list[str], bool]:
    """Send so many cases, spread evenly over the routes; return answers by status, faults, and whether it is well."""
    import schemathesis
    from schemathesis import GenerationMode

    @schemathesis.serializer("application/x-ndjson")
    def write_lines(context: Any, value: Any) -> bytes:
        return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")

    document = httpx.get(f"{url}/openapi.json").json()
    document["components"].pop("securitySchemes")  # or most cases would bring a made-up key, and end there
    for verbs in document["paths"].values():
        for operation in verbs.values():
            operation.pop("security", None)
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    count = max(1, -(-cases // (2 * len(operations))))
    with requests.Session() as session:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _send_cases(session, url, operation, mode, count, number, statuses, faults)
    return statuses, faults, httpx.get(f"{url}/health/ready").status_code == 200


def _send_cases(
    session: requests.Session,
    url: str,
    operation: Any,
    mode: Any,
    count: int,
    number: int,
    statuses: Counter[int],
    faults: list[str],
) -> None:
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except Exception as error:  # nothing to be wrong with, where a route takes nothing
        print(f"{operation.label}, {mode.value}: {type(error).__name__}", file=sys.stderr)
        return

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def send(case: Any) -> None:
        answer = case.call(base_url=url, session=session)
        statuses[answer.status_code] += 1
        if (problem := find_fault(answer)) and len(faults) < 1000:
            faults.append(f"{case.method} {case.path}: {answer.status_code} {problem}: {case.as_curl_command()[:600]}")

    try:
        send()
    except Exception as error:
        if type(error).__name__ not in ("Unsatisfiable", "InvalidArgument"):
            raise
        print(f"{operation.label}, {mode.value}: no cases ({type(error).__name__})", file=sys.stderr)


def find_fault(answer: Any) -> str:
    """Return what is wrong with an answer; "" where nothing is."""
    names = {name.lower(): value for name, value in answer.headers.items()}
    kind = names.get("content-type", "")
    kind = kind[0] if isinstance(kind, list) else kind
    if answer.status_code == 500:
        return "is a fault of the service"
    if answer.status_code >= 400 and not kind.startswith("application/problem+json"):
        return f"is no problem but {kind or 'nothing'}"
    return "" if "x-request-id" in names else "has no id of the request"


if __name__ == "__main__":
    main()
