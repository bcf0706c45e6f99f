"""What the demo refuses before Gradio sees it: whatever would be kept on its disk, and bodies beyond any query's size.

Gradio takes uploads for every app, downloads an address that stands where a file may stand, and saves a page's state
under a link of its own. The demo's inputs are a text, a number and a name, so none of the three has a use here.
"""

from __future__ import annotations

import json
from typing import Any

from gradio_client.utils import is_file_obj_with_meta, traverse
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 * 2**10  # bytes; the longest query that the page lets a visitor type takes 16 KiB


class Limits:
    """ASGI middleware: 413 for a body of more than `MAX_BODY` bytes, 415 for files, 400 for other bodies than JSON, 404
    for saving a page's state."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body, more = b"", True
        if headers.get(b"content-type", b"").lower().startswith(b"multipart/"):
            refused = PlainTextResponse("This demo takes no files.", 415)
        elif scope["path"].rstrip("/").endswith("/deep_link"):
            refused = PlainTextResponse("This demo saves no state.", 404)
        else:
            while more and len(body) <= MAX_BODY:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
            refused = _refusal(body)
        if refused is not None:
            refused.headers["connection"] = "close"  # what is left of the body is not read
            await refused(scope, receive, send)
            return
        read = False

        async def replay() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


def _refusal(body: bytes) -> PlainTextResponse | None:
    if len(body) > MAX_BODY:
        return PlainTextResponse(f"Expected a request of at most {MAX_BODY:,} bytes, found more.", 413)
    files: list[Any] = []
    try:
        if body:
            traverse(json.loads(body), files.append, is_file_obj_with_meta)
    except (ValueError, RecursionError, AttributeError) as error:  # the last: a file whose "meta" is no object
        return PlainTextResponse(f"Expected JSON of texts and numbers, found none ({type(error).__name__}).", 400)
    return PlainTextResponse("This demo takes no files.", 415) if files else None
