"""Requests to a server that may fail, asked again and again; bounded."""

import http.client
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any

MIB = 1 << 20
_AGENT = "geon"
_LONG = 5.0
"""Seconds from which on a wait is said."""
_FINAL = {400, 401, 403, 404, 405, 410, 451}
"""Answers that another try does not change."""


class DownloadError(RuntimeError):
    """A file could not be fetched. The message says which, why, and what to do."""


class Stopped(Exception):
    """The user, or another file's error, asked to stop; what was fetched stays."""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        tries: failures in a row, without a MiB between, that end it.
        first, most: seconds before the second try, doubled each time up to the most.
        asked: seconds at most that a server may ask to be left alone (Retry-After).
        timeout: seconds without a byte.
    """

    tries: int = 8
    first: float = 1.0
    most: float = 60.0
    asked: float = 600.0
    timeout: float = 30.0

    def seconds(self, failures: int, asked: float) -> float:
        """Time to wait after so many failures."""
        return max(min(asked, self.asked), min(self.most, self.first * 2 ** (failures - 1)))


class Trouble(Exception):
    """What another try may change. asked: seconds that the server wants to be left alone."""

    def __init__(self, words: str, asked: float = 0.0) -> None:
        super().__init__(words)
        self.asked = asked


def request(url: str, timeout: float, start: int = 0) -> http.client.HTTPResponse:
    """Ask for a file from a byte on; redirects are followed.

    Raises:
        DownloadError: another try would not change it.
        Trouble: it might.
    """
    headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        said = f"{url}: the server answers {error.code} {error.reason}"
        if error.code in (401, 403):
            said += "; it may be private or gated"
        if error.code in _FINAL:
            raise DownloadError(said) from None
        raise Trouble(said, _asked(error.headers.get("Retry-After"))) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{url}: {error.reason}") from None
        raise Trouble(f"{url}: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Trouble(f"{url}: {words(error)}") from None
    except ValueError as error:
        raise DownloadError(f"'{url}' is no address: {error}") from None


def patiently(
    action: Callable[[], Any], patience: Patience, stop: Event, gained: Callable[[], int]
) -> Any:
    """Do something that may fail, again and again.

    gained: bytes so far; each MiB makes the failures before it forgotten.

    Raises:
        DownloadError: too many failures in a row.
        Stopped: on request, while waiting.
    """
    failures, before = 0, gained()
    while True:
        try:
            return action()
        except Trouble as error:
            if gained() - before >= MIB:
                failures, before = 0, gained()
            failures += 1
            if failures >= patience.tries:
                raise DownloadError(
                    f"{error} (the last of {failures} tries); what was fetched is kept, run the "
                    "same command again to go on"
                ) from None
            seconds = patience.seconds(failures, error.asked)
            if seconds >= _LONG:
                said = f"geon: {error}; another try in {seconds:.0f} s"
                print(said, file=sys.stderr, flush=True)
            if stop.wait(seconds):
                raise Stopped from None


def _asked(header: str | None) -> float:
    """Seconds of a Retry-After: a number, or a date."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def words(error: BaseException) -> str:
    """What an error says, or what it is called where it says nothing."""
    return str(error) or type(error).__name__
