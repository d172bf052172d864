"""The page at /: a few files of the package, read once, under a policy that lets nothing else in."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from peft_combo.serving.routes.json_route import describe, make_router

router = make_router("page")
_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_KINDS = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip


@router.get("/", include_in_schema=False, **describe(None))
async def index(request: Request) -> Response:
    """The page."""
    return _send("index.html")


@router.get("/page/{name}", include_in_schema=False, **describe(None))
async def file(name: str, request: Request) -> Response:
    """A file of the page."""
    return _send(name)


def _send(name: str) -> Response:
    found = _read_files().get(name)
    if found is None:
        raise HTTPException(404, f"/page/{name}")
    content, kind = found
    return Response(
        content,
        headers={"Content-Type": kind, "Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"},
    )


@cache
def _read_files() -> dict[str, tuple[bytes, str]]:
    """Read the page's files: a name is looked up among these, so that no path is ever made of one."""
    folder = files("peft_combo.serving") / "page"
    if not folder.is_dir():
        return {}
    kinds = {one.name: _KINDS.get("." + one.name.rpartition(".")[2]) for one in folder.iterdir()}
    return {name: ((folder / name).read_bytes(), kind) for name, kind in kinds.items() if kind}
