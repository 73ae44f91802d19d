"""The exceptions of our own: wrong input, a lost rank, a request to stop, no memory or disk."""


class UsageError(ValueError):
    """Bad input from the user.

    The message names the value, what was expected, and the config key (or flag) to change.
    Command lines print it without a traceback and exit with status 2.
    """


class ExchangeError(RuntimeError):
    """A collective of the optimizer failed, most likely because another rank ended.

    The message names the collective, the bucket and the first parameter in it.
    """


def nearest(word: str, choices: list[str]) -> str:
    """Return ' Did you mean X?' for the closest choice, or '' when nothing is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


class OutOfMemory(Exception):
    """A device has no more memory: the message says what was asked for, and what needs less."""


class RankLost(RuntimeError):
    """Another rank ended, or does not answer, so that this one cannot go on.

    The message names this rank, its host, step and phase, and says where the others stand.
    """


class Preempted(Exception):
    """The run was asked to stop and has saved what there was; started again, it goes on.

    The message is printed by the rank that has one.
    """


class SaveError(Exception):
    """A checkpoint could not be written: the message says why, and the bytes needed and free."""


def shown(text: str, most: int = 120) -> str:
    """A text of the user's in one printable line, cut where it is long."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= most else f"{line[:most]}..."
