"""push_to_hub: huggingface_hub's own calls against a server on this machine that plays the hub."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden" / "folder-v1"
PUSH = "import sys, fasp_graph as fg; print(fg.push_to_hub(sys.argv[1], 'me/small'))"


class Hub(BaseHTTPRequestHandler):
    """Answers what creating a repository and committing files ask; keeps what it was sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        if self.path.endswith("/preupload/main"):
            files = [f["path"] for f in json.loads(body)["files"]]
            answer = {
                "files": [
                    {"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files
                ]
            }
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.url}/me/small/commit/1", "commitOid": "1"}
        elif self.path == "/api/repos/create":
            answer = {"url": f"{self.server.url}/me/small", "name": "me/small"}
        else:
            answer = {}
        self.reply(answer)

    def do_GET(self):
        self.reply({"id": "me/small", "sha": "0", "siblings": [], "tags": []})

    def reply(self, answer):
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_what_a_folder_lists_is_pushed_as_it_is(hub, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "small")
    (folder / "notes.txt").write_text("mine")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.url in done.stdout
    bodies = {path: body for path, _, body in hub.asked}
    created = json.loads(bodies["/api/repos/create"])
    assert (created["name"], created["organization"]) == ("small", "me")
    assert created.get("visibility") == "private" or created.get("private") is True
    (commit,) = [body for path, body in bodies.items() if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {v["value"]["path"]: v["value"]["content"] for v in lines if v["key"] == "file"}
    expected = {path.name: path.read_bytes() for path in GOLDEN.iterdir()}
    assert {name: base64.b64decode(content) for name, content in sent.items()} == expected
    assert {token for _, token, _ in hub.asked} == {"Bearer hf_secret"}
