"""The page to try a model: what it answers, to whom, and how it looks in a real browser."""

import argparse
import base64
import http.client
import io
import json
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from raytune_emotion import demo
from raytune_emotion.cli import command_main
from raytune_emotion.demo import DemoServer, make_server
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn.export_folder import load_package, write_package
from raytune_emotion.storage.locations import Folder
from tests.support.browser import browser, needs_chromium
from tests.support.exports import untrained_best


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    dest = tmp_path_factory.mktemp("demo") / "best"
    write_package(dest, untrained_best("test_resnet", 32))
    return load_package(dest)


@pytest.fixture(scope="module")
def server(package):
    with make_server(package, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def face(faces):
    return next((faces / "val_set" / "images").iterdir())


def answer_of(server, method, path, body=b"", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, body, {"Host": f"localhost:{server.server_port}", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_address_is_shown_at_once_also_in_a_pipe(package, tmp_path, monkeypatch):
    raw = io.BytesIO()

    class Served(DemoServer):
        def serve_forever(self):
            shown.append(raw.getvalue().decode())

    shown = []
    monkeypatch.setattr(demo, "make_server", lambda package, port: Served(package, port))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    write_package(tmp_path / "best", untrained_best("test_resnet", 32))
    demo.run(argparse.Namespace(export=Folder(tmp_path / "best"), port=0))
    assert shown[0].startswith("open http://")


def test_answer_is_what_predict_says(server, package, face):
    status, raw = answer_of(server, "POST", "/predict", face.read_bytes())
    assert status == 200
    rows = json.loads(raw)["classes"]
    assert [row["name"] for row in rows] == list(EMOTIONS)
    wanted = package.predict(np.array(Image.open(face).convert("RGB"))[None])[0]
    assert np.allclose([row["probability"] for row in rows], wanted, atol=1e-6)


def test_a_browser_that_goes_away_is_no_error(server, capsys):
    for error, told in ((ConnectionResetError("gone"), False), (ValueError("a fault"), True)):
        try:
            raise error
        except (ConnectionError, ValueError):
            server.handle_error(None, ("127.0.0.1", 1))
        assert ("Traceback" in capsys.readouterr().err) is told


def test_bad_pictures_and_paths_are_answers_and_not_the_end(server, face):
    assert answer_of(server, "POST", "/predict", b"<svg/>") == (
        400, b'{"error": "no picture in JPEG, PNG, BMP, GIF or WebP format"}'
    )  # fmt: skip
    for length in ("99999999", "²"):
        assert answer_of(server, "POST", "/predict", b"", **{"Content-Length": length})[0] == 413
    assert b"LARGEST = 50;" in answer_of(server, "GET", "/")[1], "the page asks about no larger ones"
    assert answer_of(server, "GET", "/etc/passwd")[0] == 404
    assert answer_of(server, "POST", "/predict", face.read_bytes())[0] == 200


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_other_sites_get_nothing(server, face, headers):
    assert answer_of(server, "POST", "/predict", face.read_bytes(), **headers)[0] == 403
    assert answer_of(server, "GET", "/", **headers)[0] == 403
    assert server.server_address[0] == "127.0.0.1"


def test_port_that_is_taken_is_a_sentence(server, package, tmp_path, capsys):
    write_package(tmp_path / "best", untrained_best("test_resnet", 32))
    assert command_main("demo", [str(tmp_path / "best"), "--port", str(server.server_port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --port {server.server_port}: cannot open the port (")


@needs_chromium
def test_page_shows_bars_beside_the_picture(server, face):
    picture = io.BytesIO()
    Image.open(face).resize((300, 360)).save(picture, "JPEG")

    def choose(content: bytes, more: int = 0) -> str:
        text = base64.b64encode(content).decode()
        return f"""
            const bytes = Uint8Array.from(atob("{text}"), (c) => c.charCodeAt(0));
            const files = new DataTransfer();
            files.items.add(new File([bytes, new Uint8Array({more})], "<b>face</b>.jpg", {{ type: "image/jpeg" }}));
            document.getElementById("file").files = files.files;
            document.getElementById("file").dispatchEvent(new Event("change"));
        """

    with browser() as tab:
        for width, dark in ((1200, False), (390, True)):
            tab.open(server.address, width=width, dark=dark)
            tab.eval(f"(() => {{ {choose(picture.getvalue())} }})()")
            tab.wait("document.querySelectorAll('#bars li').length === 13")
            shown = tab.eval("[...document.querySelectorAll('#bars li')].map((row) => row.innerText.split('\\n')[0])")
            assert shown == list(EMOTIONS)
            assert tab.eval("document.querySelectorAll('li.first').length") == 1
            tab.wait("document.getElementById('picture').naturalWidth === 300")
            assert tab.eval("document.documentElement.scrollWidth <= innerWidth")
            bars, shown = (f"document.getElementById('{name}').getBoundingClientRect()" for name in ("bars", "picture"))
            assert tab.eval(f"{bars}.left > {shown}.right") == (width > 640)
        assert tab.errors == []
        assert all(url.startswith((server.address, "blob:", "data:")) for url in tab.requests)
        tab.eval(f"(() => {{ {choose(b'no picture')} }})()")
        tab.wait(
            "document.getElementById('message').innerText.startsWith('This picture cannot be used: no picture in')"
        )
        tab.eval(f"(() => {{ {choose(picture.getvalue(), more=50 * 2**20)} }})()")
        tab.wait(
            "document.getElementById('message').innerText === 'This picture cannot be used: it is larger than 50 MiB.'"
        )
