"""A dataset by its name on a hub, a server on 127.0.0.1: pinned to a commit, and streamed."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest

from geon.launch import local

COMMIT = "c0ffee" + "0" * 34
TEXTS = [f"document {i} " + "x" * (i % 37) for i in range(80)]
FILES = {
    f"data/train-{i}.jsonl": "".join(
        json.dumps({"text": text}) + "\n" for text in TEXTS[40 * i : 40 * i + 40]
    ).encode()
    for i in range(2)
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as `datasets` asks for, of one repository."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        api = "/api/datasets/some/set"
        if path == api or path.startswith(f"{api}/revision/"):
            names = [{"rfilename": name} for name in FILES]
            return self.json({"id": "some/set", "sha": COMMIT, "siblings": names, "tags": []})
        if tree := re.fullmatch(rf"{api}/tree/{COMMIT}/?(.*)", path):
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
                for name, content in FILES.items()
                if name.startswith(tree[1])
            ]
            folder = {"type": "directory", "path": "data", "oid": "2" * 40, "size": 0}
            return self.json(rows if tree[1] else [folder])
        name = path.removeprefix(f"/datasets/some/set/resolve/{COMMIT}/")
        if name not in FILES:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.server.asked.append(name)
        content, headers = FILES[name], {"ETag": '"x"', "X-Repo-Commit": COMMIT}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.answer(200, content, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self.answer(206, content[start:stop], headers)

    def json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


PROGRAM = """
import json
from dataclasses import replace
from geon.data.hf import Where, identify, open_dataset
from geon.data.stream import Recipe, Stream
from geon.errors import UsageError
where = Where("some/set")
known = identify(where)
where = replace(where, revision=known["revision"])
stream = Stream(Recipe(where, "bytes", 1, 16, 0, False, 1, 0), 0, open_dataset(where))
rows = stream.windows(80)
again = Stream(stream._recipe, 0, open_dataset(where), json.loads(json.dumps(stream.place())))
try:
    identify(Where("some/other"))
except UsageError as error:
    said = str(error)
print(json.dumps([known, rows.tolist(), again.windows(20).tolist(), said]))
"""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.daemon_threads = [], True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub_is_pinned_streamed_and_gone_on_with(hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_port}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "PYTHONPATH": str(local.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    known, rows, again, said = json.loads(done.stdout.splitlines()[-1])
    assert known == {"revision": COMMIT, "fingerprint": f"some/set@{COMMIT}"}
    ids = np.frombuffer("".join(f"\0{text}" for text in TEXTS).encode(), np.uint8)
    expected = [ids[i : i + 17].tolist() for i in range(0, 100 * 16, 16)]
    assert rows == expected[:80] and again == expected[80:]
    assert set(hub.asked) == set(FILES)
    assert said.startswith("data.dataset 'some/other' is no file or folder here, and the hub does")
