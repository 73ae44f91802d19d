"""A hub on 127.0.0.1 that answers as the public one does, or fails as told."""

import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


class Hub:
    """A repository: files by name, and for each a list of failures, one for each request.

    behind: what this is a mirror of, if it is, and whose addresses it gives.

    Failures: "cut:N" ends the connection after N bytes of the answer; "status:N" answers with it,
    "status:N:S" with Retry-After S too; "whole" ignores Range; "other" sends other bytes of the
    same length; "short" says and sends 7 bytes; "shifted" sends another range than was asked for.
    """

    def __init__(self, files, repo="some/set", kind="datasets"):
        self.files, self.repo, self.kind = files, repo, kind
        self.faults = defaultdict(list)
        self.asked = []
        self.slow, self.behind = 0.0, ""
        self.sizes, self.digests = {}, {}
        self.lock = threading.Lock()

    def tree(self):
        rows = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "sub"}]
        for path, content in self.files.items():
            size = self.sizes.get(path, len(content))
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            row = {"type": "file", "oid": blob, "size": size, "path": path}
            if not path.endswith(".json"):
                sha = self.digests.get(path, hashlib.sha256(content).hexdigest())
                row["lfs"] = {"oid": sha, "size": size, "pointerSize": 134}
            rows.append(row)
        return rows


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path.startswith("/cdn/"):
            _, _, number, name = path.split("/", 3)
            return self.file(self.server.hubs[int(number)], name)
        for number, hub in enumerate(self.server.hubs):
            if f"/{hub.repo}/" in path:
                return self.repository(hub, number, path, query)
        return self.plain(404, b"Repository not found")

    def repository(self, hub, number, path, query):
        prefix = "datasets/" if hub.kind == "datasets" else ""
        api, resolve = f"/api/{hub.kind}/{hub.repo}", f"/{prefix}{hub.repo}/resolve/{COMMIT}/"
        if path == f"{api}/revision/main":
            return self.fail(hub, "revision") or self.json({"sha": COMMIT, "id": hub.repo})
        if path == f"{api}/tree/{COMMIT}" and "recursive=true" in query:
            rows, start = hub.tree(), int("cursor=" in query)
            base = hub.behind or f"http://{self.headers['Host']}"
            link = None if start else f'<{base}{self.path}&cursor=x>; rel="next"'
            return self.json(rows[1:] if start else rows[:1], link)
        name = path.removeprefix(resolve)
        if path.startswith(resolve) and name in hub.files:
            self.send_response(302)
            self.send_header("Location", f"/cdn/{number}/{name}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.plain(404, b"Entry not found")

    def fail(self, hub, key):
        with hub.lock:
            fault = hub.faults[key].pop(0) if hub.faults[key] else ""
        if fault.startswith("status"):
            _, status, *after = fault.split(":")
            self.plain(int(status), b"trouble", {"Retry-After": after[0]} if after else {})
            return True
        self.fault = fault
        return False

    def file(self, hub, name):
        asked = self.headers.get("Range")
        with hub.lock:
            hub.asked.append((name, asked))
        if self.fail(hub, name):
            return
        content, start = hub.files[name], 0
        if self.fault == "other":
            content = bytes(len(content))
        headers = {}
        if self.fault == "short":
            content = content[:7]
        elif asked and self.fault != "whole":
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            told = start + 5 if self.fault == "shifted" else start
            headers["Content-Range"] = f"bytes {told}-{len(content) - 1}/{len(content)}"
        cut = int(self.fault[4:]) if self.fault.startswith("cut:") else None
        self.plain(206 if headers else 200, content[start:], headers, cut)

    def json(self, content, link=None):
        self.plain(200, json.dumps(content).encode(), {"Link": link} if link else {})

    def plain(self, status, content, headers=None, cut=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        content = content[:cut]
        for i in range(0, len(content), 1 << 18):
            time.sleep(self.server.hubs[0].slow)
            self.wfile.write(content[i : i + (1 << 18)])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serving(*hubs):
    """Serve repositories; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hubs, server.daemon_threads = hubs, True
    server.handle_error = lambda *words: None  # a client that ends early is what is tested
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
