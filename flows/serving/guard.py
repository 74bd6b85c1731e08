"""Prefect's and MLflow's servers behind a guard, each one process: `python -m flows.serving.guard prefect|mlflow FD`; ui.py starts them.

Listening on 127.0.0.1 keeps other machines out, and neither the pages that a browser has open nor the other people of a shared machine.
A page may send requests to 127.0.0.1, and read the answers too once its own name resolves to it (DNS rebinding): so Host must be a name
of this machine, and Origin the server itself. Another person of the machine may connect: so both servers take a password. Whoever writes
to Prefect runs code as the person whose worker or `serve` asks it, and MLflow hands out and takes in files with the rights of its process.

The servers' own means are not enough. Prefect 3.8 has a password, asked once by its page, and no look at Host or Origin. MLflow 3.17 looks
at Host, lets a foreign Origin read and send GraphQL, trusts every port of this machine, and has no password short of a user database.
The guard does what they have in common, so both are used as they are. It knows no names of machines: a tunnel (ssh -L 4200:127.0.0.1:4200)
works, from any port to any port.
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
"""The variable that holds user:password, of both servers: Prefect's own name for it."""
STORE, ARTIFACTS = "GPTQ_UI_STORE", "GPTQ_UI_ARTIFACTS"
"""Variables for MLflow: its database, whose address may hold a password, and the folder of artifacts that are sent to it over HTTP."""
HERE_ALONE = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'self'"
"""What a page may load from and send to: its own server. Prefect's page calls a service of analytics whatever its settings say. Nor may
a foreign page show one of these inside itself, to have clicks made on it."""
LOCAL = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")


class Guard:
    """Answers 403 where Host or Origin is foreign, 401 without the password, if one is given; passes everything else on."""

    def __init__(self, app: ASGIApp, auth: str | None = None) -> None:
        """auth: user:password that every request must bring; None: the app asks itself."""
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
            return PlainTextResponse("refused: a foreign Origin; only pages of this server may ask it\n", 403)
        # an image or a script of a foreign page comes without Origin, but not unmarked; a link that a person follows is a navigation
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return PlainTextResponse("refused: asked by a foreign page\n", 403)
        if self.wanted and not hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), self.wanted):
            asks = {"WWW-Authenticate": 'Basic realm="flows ui", charset="UTF-8"'}
            return PlainTextResponse("refused: needs the user and the password that `python -m flows ui` has told\n", 401, asks)
        return None


def _kept_here(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("Content-Security-Policy", HERE_ALONE)
        await send(message)

    return sent


def prefect() -> Guard:
    """It asks for AUTH itself: its page has a form for it, and its websockets take it in their first message."""
    from prefect.server.api.server import create_app

    return Guard(create_app())


def mlflow() -> Guard:
    """What `mlflow server --backend-store-uri STORE --artifacts-destination ARTIFACTS --workers 1` serves, without its second process."""
    from mlflow.server import constants, handlers

    root = "mlflow-artifacts:/"
    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: os.environ[STORE],
        constants.REGISTRY_STORE_URI_ENV_VAR: os.environ[STORE],
        constants.ARTIFACT_ROOT_ENV_VAR: root,
        constants.ARTIFACTS_DESTINATION_ENV_VAR: os.environ[ARTIFACTS],
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
    }
    handlers.initialize_backend_stores(os.environ[STORE], os.environ[STORE], root)  # a fresh database is migrated before any run comes
    from mlflow.server.fastapi_app import app

    return Guard(app, os.environ.get(AUTH))


def main(name: str, descriptor: str) -> None:
    """Serve on a socket that listens already: the parent knows its port, and nobody takes it meanwhile."""
    app: Any = {"prefect": prefect, "mlflow": mlflow}[name]()
    # no trust in X-Forwarded-*; a page that stays open must not hold up the end
    config = uvicorn.Config(
        app, lifespan="on", log_level="warning", access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=2
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(descriptor))])


if __name__ == "__main__":
    main(*sys.argv[1:])
