"""Codecs by name."""

import hashlib
from pathlib import Path

from geon.data.codec import ByteCodec, Codec, load_codec
from geon.errors import UsageError


def open_codec(name: str) -> Codec:
    """Codec of a name: bytes, or a tokenizer.json, or a folder that holds one, of a byte-level BPE.

    Raises:
        UsageError: another name, or a file that is no such tokenizer.
    """
    if name == "bytes":
        return ByteCodec()
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = path.read_text("utf-8")
        codec = load_codec(text)
    except UsageError:
        raise
    except Exception as error:  # whatever the tokenizers package makes of another text
        raise UsageError(f"data.tokenizer '{name}' cannot be read: {error}") from None
    codec.name, codec.fingerprint = name, hashlib.sha256(text.encode()).hexdigest()
    return codec
