"""Codecs by name."""

import logging
from pathlib import Path

from geon.data.codec import ByteCodec, Codec, load_codec
from geon.errors import UsageError

FILE = "tokenizer.json"
GPT2 = "openai-community/gpt2"
"""Where `gpt2` lies on the hub."""


def open_codec(name: str) -> Codec:
    """Codec of a name.

    name: bytes; gpt2; a tokenizer.json; a folder that holds one, or GPT-2's vocab.json and
        merges.txt; or OWNER/NAME on the Hugging Face hub, taken from its cache where it is there.

    Raises:
        UsageError: no such tokenizer, not to be read, or no package for it.
    """
    if name == "bytes":
        return ByteCodec()
    path = Path(name).expanduser()
    try:
        text = _read(path) if path.exists() else _fetch(name)
        codec = load_codec(text)
    except UsageError as error:
        raise UsageError(f"tokenizer '{name}': {error}") from None
    except Exception as error:  # whatever the tokenizers package makes of another text
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"tokenizer '{name}' cannot be read: {reason}") from None
    codec.name = name
    return codec


def _read(path: Path) -> str:
    """Text of the tokenizer.json at a path."""
    if path.is_file():
        return path.read_text("utf-8")
    if (path / FILE).is_file():
        return (path / FILE).read_text("utf-8")
    old = path / "vocab.json", path / "merges.txt"
    if all(file.is_file() for file in old):
        from geon.data.bpe import from_merges

        return from_merges(*map(str, old))
    raise UsageError(
        f"the folder holds no {FILE}: transformers writes one by "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _fetch(name: str) -> str:
    """Text of the tokenizer.json of a repository on the hub, or in its cache."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".json"):
        raise UsageError(
            f"no such file or folder (looked in {Path.cwd()}); give bytes, gpt2, a {FILE}, a "
            "folder that holds one, or OWNER/NAME on the Hugging Face hub"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UsageError(
            "no file or folder here; from the hub it needs the 'huggingface_hub' package: "
            "pip install -e '.[data]'"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        found = hf_hub_download(GPT2 if name == "gpt2" else name, FILE)
    except Exception as error:  # no network, no such name, no leave
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"it is no file or folder here, and the Hugging Face hub does not give its {FILE} "
            f"({type(error).__name__}: {reason}); where there is no network, give the path of "
            f"a {FILE}, or of a folder that holds one"
        ) from None
    return Path(found).read_text("utf-8")
