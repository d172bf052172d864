"""Software bill of materials: what an installed package stands on, with versions and licences, as CycloneDX JSON.

Run it where the service is installed, in an image above all: ``python tools/sbom.py peft-combo --extras serve``. It
reads what is installed and asks nobody, so it lists what is there and not what could be. Looking versions up among
known vulnerabilities needs a database from outside: ``osv-scanner --sbom`` and ``trivy sbom`` take this file where
there is a network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def list_requirements(name: str, extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """Yield what an installed distribution requires here, with these of its extras."""
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def find_closure(root: str, extras: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return every distribution that `root` stands on, itself included, with what each requires directly.

    Raises:
        PackageNotFoundError: something that is required is not installed.
    """
    found: dict[str, list[str]] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonicalize_name(root), frozenset(extras))]
    while waiting:
        name, chosen = waiting.pop()
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        needed = list(list_requirements(name, chosen))
        names = {canonicalize_name(one.name) for one in needed}
        found[name] = sorted({*found.get(name, ()), *names} - {name})
        waiting += [(canonicalize_name(one.name), frozenset(one.extras)) for one in needed]
    return found


def describe_component(name: str) -> dict[str, Any]:
    """Return one distribution as a CycloneDX component."""
    told = metadata.metadata(name)
    version = metadata.version(name)
    component: dict[str, Any] = {
        "type": "library", "name": name, "version": version, "purl": name_purl(name), "bom-ref": name_purl(name),
    }  # fmt: skip
    if expression := told.get("License-Expression"):
        component["licenses"] = [{"expression": expression}]
    elif classifiers := [one for one in told.get_all("Classifier") or () if one.startswith("License :: ")]:
        component["licenses"] = [{"license": {"name": one.rsplit(" :: ", 1)[-1]}} for one in classifiers]
    elif (text := (told.get("License") or "").strip()) and len(text) <= 100:
        component["licenses"] = [{"license": {"name": text}}]
    return component


def name_purl(name: str) -> str:
    """Return the package URL of an installed distribution; what is built here (torch's +cpu) keeps its local part."""
    return f"pkg:pypi/{name}@{metadata.version(name).replace('+', '%2B')}"


def build_bom(root: str, extras: Iterable[str] = ()) -> dict[str, Any]:
    """Return the bill of materials of an installed distribution."""
    closure = find_closure(root, extras)
    main = canonicalize_name(root)
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {"component": {**describe_component(main), "type": "application"}},
        "components": [describe_component(name) for name in sorted(closure) if name != main],
        "dependencies": [
            {"ref": name_purl(name), "dependsOn": [name_purl(one) for one in needed]}
            for name, needed in sorted(closure.items())
        ],
    }  # fmt: skip


def main() -> int:
    """Print the bill of materials of a package that is installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package")
    parser.add_argument("--extras", default="", help="Extras that are installed, as in serve,postgres.")
    options = parser.parse_args()
    try:
        bom = build_bom(options.package, [one for one in options.extras.split(",") if one])
    except metadata.PackageNotFoundError as error:
        print(
            f"{error.name} is required and not installed here. Install the package, with its extras.", file=sys.stderr
        )
        return 1
    print(json.dumps(bom, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
