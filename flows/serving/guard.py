"""Serve Prefect or MLflow behind a guard, one process each: `python -m flows.serving.guard prefect|mlflow FD`; ui.py starts them.

Listening on 127.0.0.1 keeps other machines out, but neither the pages open in a browser nor other users of a shared machine. A page can
send requests to 127.0.0.1, and can read the answers once its own name resolves there (DNS rebinding): so Host must be a loopback name, and
Origin the server itself. Another user can connect: so both servers require a password. Whoever can write to Prefect can run code as the
user of a worker or of `serve`, and MLflow reads and writes files with the rights of its process.

The servers' own settings do not suffice. Prefect 3.8 has a password and CORS origins, but answers requests of any Host and Origin. MLflow
3.17 with --allowed-hosts, --cors-allowed-origins and its basic-auth app checks Host except at /health; but it executes GraphQL and answers
every GET for a foreign Origin, and to any port of this machine it also sends CORS headers with credentials, whatever origins are
configured. Neither sets a Content-Security-Policy.

The guard accepts any port of a loopback name, so that a tunnel (ssh -L 4200:127.0.0.1:4200) works between any two ports.
"""

from __future__ import annotations

import base64
import hmac
import os
import re
import socket
import sys
from typing import Any

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

AUTH = "PREFECT_SERVER_API_AUTH_STRING"
"""Environment variable with user:password of both servers; the name is Prefect's."""
STORE, ARTIFACTS = "GPTQ_UI_STORE", "GPTQ_UI_ARTIFACTS"
"""Environment variables for MLflow: its database, whose address may hold a password, and the folder of artifacts sent over HTTP."""
HERE_ALONE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'self'"
"""Content-Security-Policy: a page loads from and sends to its own server only, since Prefect's page calls an analytics service whatever its
settings are; and no foreign page may embed it, to steal clicks."""
LOCAL = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")


class Guard:
    """Answers 403 where Host or Origin is foreign, 401 without the password, if one is given; passes everything else on."""

    def __init__(self, app: ASGIApp, auth: str | None = None) -> None:
        """auth: user:password that every request must carry; None if the app checks it itself or there is none."""
        self.app = app
        self.wanted = None if auth is None else b"Basic " + base64.b64encode(auth.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        refusal = self.refusal(Headers(scope=scope))
        if refusal is None:
            return await self.app(scope, receive, _kept_here(send))
        if scope["type"] == "websocket":  # closed before it is accepted: 403
            return await send({"type": "websocket.close", "code": 1008})
        await refusal(scope, receive, send)

    def refusal(self, headers: Headers) -> PlainTextResponse | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not LOCAL.fullmatch(hosts[0].lower()):
            return PlainTextResponse("refused: a foreign Host; use http://127.0.0.1:PORT\n", 403)
        if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            return PlainTextResponse("refused: a foreign Origin; only pages of this server may send requests\n", 403)
        # browsers send no Origin for an image or a script, but mark it; following a link is a navigation
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return PlainTextResponse("refused: a request of a foreign page\n", 403)
        if self.wanted and not hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), self.wanted):
            challenge = {"WWW-Authenticate": 'Basic realm="flows ui", charset="UTF-8"'}
            return PlainTextResponse("refused: needs the user and the password that `python -m flows ui` printed\n", 401, challenge)
        return None


def _kept_here(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("Content-Security-Policy", HERE_ALONE)
        await send(message)

    return sent


def prefect() -> Guard:
    """Prefect's server, which checks AUTH itself: its page has a form for it, and its websockets expect it in their first message."""
    from prefect.server.api.server import create_app

    return Guard(create_app())


def mlflow() -> Guard:
    """The app of `mlflow server --backend-store-uri STORE --artifacts-destination ARTIFACTS --workers 1`, without its second process."""
    from mlflow.server import constants, handlers

    root = "mlflow-artifacts:/"
    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: os.environ[STORE],
        constants.REGISTRY_STORE_URI_ENV_VAR: os.environ[STORE],
        constants.ARTIFACT_ROOT_ENV_VAR: root,
        constants.ARTIFACTS_DESTINATION_ENV_VAR: os.environ[ARTIFACTS],
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    handlers.initialize_backend_stores(os.environ[STORE], os.environ[STORE], root)  # migrates a fresh database before any run uses it
    from mlflow.server.fastapi_app import app

    return Guard(app, os.environ.get(AUTH))


def main(name: str, descriptor: str) -> None:
    """Serve on a socket that already listens: the parent knows its port, and no other program can take it meanwhile."""
    app: Any = {"prefect": prefect, "mlflow": mlflow}[name]()
    # X-Forwarded-* is not trusted; an open page must not delay shutdown
    config = uvicorn.Config(
        app, lifespan="on", log_level="warning", access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=2
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(descriptor))])


if __name__ == "__main__":
    main(*sys.argv[1:])
