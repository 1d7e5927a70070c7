"""The download door against a server of its own: whole files of weights, or a message that helps."""

import http.server
import io
import threading

import pytest
import torch
from networks import build_tiny

from mambair_ds.download import FILES, main


@pytest.fixture
def server():
    """Serves `content` under any name; `cut` announces more than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        content, cut = b"", False

        def do_GET(self):
            self.send_response(200 if Handler.content else 404)
            self.send_header("Content-Length", str(len(Handler.content) + (7 if Handler.cut else 0)))
            self.end_headers()
            self.wfile.write(Handler.content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Handler.url = f"http://127.0.0.1:{server.server_port}"
        yield Handler
        server.shutdown()


def weights():
    stream = io.BytesIO()
    torch.save({"params": build_tiny().state_dict()}, stream)
    return stream.getvalue()


def test_weights_arrive_and_are_not_replaced(server, tmp_path, capsys):
    server.content = weights()
    command = ["x2_light", "--out", str(tmp_path), "--url", server.url]
    assert main(command) == 0
    assert (tmp_path / "mambairv2_lightSR_x2.pth").read_bytes() == server.content
    assert "MambaIRv2Light x2" in capsys.readouterr().out
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    "content, cut, code, words",
    [(b"", False, 1, "404"), (weights(), True, 1, "IncompleteRead"), (b"<html>sign in</html>", False, 2, "broken")],
    ids=["missing", "cut", "a page"],
)
def test_what_is_no_whole_file_of_weights_is_not_kept(server, tmp_path, capsys, content, cut, code, words):
    server.content, server.cut = content, cut
    assert main(["x2", "--out", str(tmp_path), "--url", server.url]) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_without_a_network_the_file_to_copy_is_named(tmp_path, capsys):
    assert main(["x4", "--out", str(tmp_path), "--url", "http://127.0.0.1:9"]) == 1
    assert f"copy the file to {tmp_path / FILES['x4']}" in capsys.readouterr().err
