"""Bodies as they come in: bounded in length and in time."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request

from app.reading import MAX_BODY_BYTES


async def body_of(request: Request) -> bytes:
    """The body, refused before it is held when it is too long, and given up when it drips in."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise HTTPException(413, f"the body may have at most {MAX_BODY_BYTES:,} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(request.app.state.configuration.body_timeout_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the body may have at most {MAX_BODY_BYTES:,} bytes")
    except TimeoutError:
        raise HTTPException(408, "the body did not arrive in time", headers={"connection": "close"}) from None
    return bytes(body)
