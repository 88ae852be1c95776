"""Access control: only this machine, or others with a password; requests from pages of other sites are refused."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_adapters.convert.errors import UsageError
from lora_adapters.convert.parsing import read_text

PASSWORD = "LORA_ADAPTERS_STUDIO_PASSWORD"
USER = "studio"
_SHORTEST = 8  # characters of a password


def password(args: Any) -> str | None:
    """The password, or None. UsageError if --listen or --share is used without a password, or it is too short."""
    if args.password_file:
        try:
            word = read_text(args.password_file).split("\n")[0].strip()
        except OSError as error:
            raise UsageError(f"--password_file {args.password_file} cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UsageError(f"--password_file {args.password_file}: {error}") from None
    else:
        word = os.environ.get(PASSWORD, "")
    if not word and not args.password_file:
        for flag in ("listen", "share"):
            if getattr(args, flag):
                raise UsageError(f"--{flag} gives others access: set a password with --password_file or {PASSWORD}")
        return None
    if len(word) < _SHORTEST:
        raise UsageError(f"the password has {len(word)} characters, but needs at least {_SHORTEST}")
    return word


class OwnOrigin:
    """ASGI middleware that refuses browser requests whose Origin is another site than the studio's own page.

    app: the wrapped ASGI application.
    """

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {key.lower(): value.decode("latin-1") for key, value in scope.get("headers", [])}
        origin = headers.get(b"origin")
        if scope["type"] == "http" and origin and urlsplit(origin).netloc != headers.get(b"host"):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"requests from other sites are refused"})
            return
        await self._app(scope, receive, send)


def launch_options(args: Any, word: str | None, output: Path) -> dict[str, Any]:
    """Launch options for Gradio: access control, and the files that the page may show."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    layers = [] if args.share else [Middleware(OwnOrigin)]  # a shared page has another address than the local one
    if not args.listen and not args.share:  # protects from DNS rebinding: foreign names that resolve to this machine
        layers.append(Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]))
    return {
        "server_name": "0.0.0.0" if args.listen else "127.0.0.1",
        "server_port": args.port,
        "share": args.share,
        "auth": (USER, word) if word else None,
        "allowed_paths": [str(output)],
        "blocked_paths": [],
        "max_file_size": "1kb",  # nothing is uploaded
        "app_kwargs": {"middleware": layers, "docs_url": None, "redoc_url": None, "openapi_url": None},
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
        "strict_cors": True,
        "quiet": True,
        "prevent_thread_lock": True,
    }
