"""Files below a folder, links followed, none twice."""

from pathlib import Path

from geon.errors import UsageError


def files_below(root: Path) -> list[Path]:
    """Files below a folder in the order of their names; hidden files and folders are left out.

    Links to files and folders are followed. What can be reached in several ways, a loop of links
    included, is found once: by its own name where that lies below the folder too.

    Raises:
        UsageError: a link to nothing.
        OSError: a folder that may not be listed.
    """
    found: dict[Path, Path] = {}
    seen: set[Path] = set()
    waiting, links = [root], list[Path]()
    while waiting or links:
        # All that lies here by its own name comes before the first link.
        folder = waiting.pop() if waiting else links.pop(0)
        if (real := folder.resolve(strict=True)) in seen:
            continue
        if folder.is_file():
            found.setdefault(real, folder)
            continue
        seen.add(real)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_symlink():
                if not path.exists():
                    raise UsageError(
                        f"'{path}' is a link to nothing: remove it, or bring what it names"
                    )
                links.append(path)
            elif path.is_dir():
                waiting.append(path)
            elif path.is_file():
                found.setdefault(real / path.name, path)
    return sorted(found.values())
