"""What a Hugging Face hub, or a mirror of it, says about the files of a repository."""

import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from threading import Event
from typing import Any
from urllib.parse import quote, urlsplit

from geon.data.download import Remote
from geon.data.web import DownloadError, Patience, Trouble, patiently, request, words
from geon.errors import UsageError

PUBLIC = "https://huggingface.co"
_MOST = 1 << 26
"""Bytes of one answer at most: 100,000 files take 20 MB."""


def list_files(
    endpoint: str, kind: str, repo: str, wanted: Callable[[str], bool], patience: Patience
) -> tuple[str, list[Remote]]:
    """Files of a repository at its newest commit, by name, with sizes and checksums.

    endpoint: base address. kind: datasets or models. wanted: says of a path whether it is.

    Returns: the commit, so that all files are of one; and the files.

    Raises:
        UsageError: an address or a name that cannot be.
        DownloadError: there is no such repository, or the server does not answer.
    """
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
        raise UsageError(f"--endpoint '{endpoint}' must be an address such as {PUBLIC}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"'{repo}' is no repository: give OWNER/NAME")
    endpoint = endpoint.rstrip("/")
    api = f"{endpoint}/api/{kind}/{repo}"
    commit = _get(f"{api}/revision/main", patience)[0].get("sha")
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise DownloadError(f"{api}/revision/main: the server names no commit: no hub")
    inner = "datasets/" if kind == "datasets" else ""
    base = f"{endpoint}/{inner}{repo}/resolve/{commit}/"
    found: dict[str, Remote] = {}
    page: str | None = f"{api}/tree/{commit}?recursive=true"
    while page:
        rows, page = _get(page, patience)
        for row in rows:
            if row.get("type") == "file" and wanted(row["path"]):
                remote = _remote(row, base)
                if remote.name in found:
                    raise UsageError(
                        f"--pattern matches two files of the name '{remote.name}' in {repo}: "
                        "narrow it"
                    )
                found[remote.name] = remote
    return commit, [found[name] for name in sorted(found)]


def _remote(row: Any, base: str) -> Remote:
    """A file by its line of a tree: large files have a SHA-256, others the SHA-1 of git."""
    try:
        large = row.get("lfs")
        path, size = row["path"], (large or row)["size"]
        digest = large["oid"] if large else row["oid"]
        name = PurePosixPath(path).name
        length = 64 if large else 40
        if type(size) is not int or not re.fullmatch(f"[0-9a-f]{{{length}}}", digest):
            raise ValueError
        if not re.fullmatch(r"[\w][\w.+=,@ -]*", name):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DownloadError(
            f"the server's list of files has a bad line: {str(row)[:200]}"
        ) from None
    return Remote(name, base + quote(path), size, digest, git=not large)


def _get(url: str, patience: Patience) -> tuple[Any, str | None]:
    """JSON of an address, and that of the next page."""

    def once() -> tuple[Any, str | None]:
        with request(url, patience.timeout) as answer:
            try:
                content = json.loads(answer.read(_MOST))
            except ValueError:
                raise Trouble(f"{url}: the answer is no JSON: no hub, or cut") from None
            except Exception as error:
                raise Trouble(f"{url}: {words(error)}") from None
            link = re.search(r'<([^<>]+)>;\s*rel="next"', answer.headers.get("Link") or "")
        if link is None:
            return content, None
        following = urlsplit(link[1])  # a mirror may send on to what it mirrors
        place = urlsplit(url)._replace(path=following.path, query=following.query)
        return content, place.geturl()

    return patiently(once, patience, Event(), lambda: 0)  # type: ignore[no-any-return]
