import torch

# pytest-xdist already uses the cores; more threads than cores make small matrices crawl.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Let `-k R09` find the tests of a row of docs/reliability.md."""
    for item in items:
        for mark in item.iter_markers("row"):
            item.extra_keyword_matches.update(mark.args)
