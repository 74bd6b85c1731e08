"""The guard in front of both servers: who is refused. The servers themselves behind it: test_ui.py."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from flows.serving.guard import Guard

AT = "http://127.0.0.1:4200"


async def page(request):
    return PlainTextResponse("page", headers={"Content-Security-Policy": "object-src 'none'"})


async def socket(websocket):
    await websocket.accept()
    await websocket.send_text("open")
    await websocket.close()


def client(auth=None):
    app = Starlette(routes=[Route("/", page, methods=["GET", "POST", "OPTIONS"]), WebSocketRoute("/socket", socket)])
    return TestClient(Guard(app, auth), base_url=AT)


@pytest.mark.parametrize(
    "headers, code",
    [
        ({}, 200),
        ({"Origin": AT}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),  # through a tunnel
        ({"Host": "[::1]:4200"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "evil.test"}, 403),
        ({"Host": "evil.test:4200"}, 403),
        ({"Host": "127.0.0.1.evil.test:4200"}, 403),
        ({"Host": "evil.test@127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:4200\t"}, 403),
        ({"Host": "192.168.0.7:4200"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:4200"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),  # another program of this machine
        ({"Origin": "http://localhost:4200"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link that was followed
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
    ],
)
def test_foreign_hosts_and_origins_are_refused(headers, code):
    for method in ("GET", "POST", "OPTIONS"):
        answer = client().request(method, "/", headers=headers)
        assert answer.status_code == code, (method, answer.text)


def test_two_hosts_are_none():
    assert client().get("/", headers=[("Host", "127.0.0.1:4200"), ("Host", "evil.test")]).status_code == 403


@pytest.mark.parametrize("headers", [{"Host": "evil.test"}, {"Origin": "http://evil.test"}])
def test_websockets_are_guarded_too(headers):
    with client().websocket_connect("ws://127.0.0.1:4200/socket") as connection:
        assert connection.receive_text() == "open"
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("ws://127.0.0.1:4200/socket", headers=headers):
        pass


def test_a_password_is_asked_where_one_is_given():
    guarded = client("gptq:a:b")
    assert guarded.get("/", auth=("gptq", "a:b")).text == "page"
    for auth in (None, ("gptq", "a"), ("other", "a:b"), ("gptq", "a:bb")):
        answer = guarded.get("/", auth=auth)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Basic"), auth
    assert guarded.get("/", headers={"Authorization": b"Basic \xe4"}).status_code == 401
    with pytest.raises(WebSocketDisconnect), guarded.websocket_connect("ws://127.0.0.1:4200/socket"):
        pass


def test_pages_stay_on_their_own_server_beside_what_they_say_themselves():
    own, ours = client().get("/").headers.get_list("Content-Security-Policy")
    assert own == "object-src 'none'" and "default-src 'self'" in ours and "frame-ancestors 'self'" in ours
    assert "http" not in ours and "*" not in ours
