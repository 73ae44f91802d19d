"""What a resume says of data that an id means another text in."""

import pytest

from geon.engine.differences import _fingerprints

HASH = {"sha256": "aa"}


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ("a" * 64, "b" * 64, True),
        ("a" * 12, "a" * 64, False),  # data=text keeps twelve digits of it
        ("", "b" * 64, False),
        (None, "b" * 64, False),
    ],
)
def test_tokenizers_are_named_where_they_differ(there, here, said):
    found = _fingerprints(HASH | {"tokenizer": there}, HASH | {"tokenizer": here})
    assert all(("tokenizer" in words) is said for words in found)
    assert (found[0] == found[1]) is not said
