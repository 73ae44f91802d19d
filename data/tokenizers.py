"""Codecs by name."""

from geon.data.codec import ByteCodec, Codec
from geon.errors import UsageError


def open_codec(name: str) -> Codec:
    """Codec of a name: bytes.

    Raises:
        UsageError: another name.
    """
    if name != "bytes":
        raise UsageError(f"data.tokenizer '{name}' is not known (bytes)")
    return ByteCodec()
