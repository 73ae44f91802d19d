"""Codecs by name."""

import json
import logging
from pathlib import Path

from geon.data.codec import ByteCodec, Codec, load_codec
from geon.errors import UsageError, nearest

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
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
    if name.startswith("train:"):
        raise UsageError(
            f"tokenizer '{name}' is for prepare_data; data=text trains one by data.bpe_vocab=4096"
        )
    try:
        text = _read(path) if path.exists() else _fetch(name)
        codec = load_codec(text)
        if codec.eot is None and (eos := _eos(path, name)):
            codec = load_codec(_with_eos(text, eos))
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


def _eos(path: Path, name: str) -> str:
    """The eos_token of the tokenizer_config.json beside a tokenizer.json; '' where none is told."""
    try:
        if path.exists():
            file = (path if path.is_dir() else path.parent) / CONFIG
            text = file.read_text("utf-8") if file.is_file() else "{}"
        else:
            text = _fetch(name, CONFIG)
    except UsageError:  # a repository without one
        return ""
    eos = json.loads(text).get("eos_token") or ""
    return str(eos["content"] if isinstance(eos, dict) else eos)


def _with_eos(text: str, eos: str) -> str:
    """A serialised tokenizer that knows its eos_token.

    Raises:
        UsageError: one that is not among its tokens.
    """
    from geon.data.bpe import EOS_KEY

    content = json.loads(text)
    if eos not in [token["content"] for token in content["added_tokens"]]:
        raise UsageError(f"{CONFIG} names eos_token '{eos}', which is no token of {FILE}")
    return json.dumps({**content, EOS_KEY: eos}, ensure_ascii=False)


def _fetch(name: str, file: str = FILE) -> str:
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
            "pip install 'geon[data]'"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        found = hf_hub_download(GPT2 if name == "gpt2" else name, file)
    except Exception as error:  # no network, no such name, no leave
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"it is no file or folder here, and the Hugging Face hub does not give its {file} "
            f"({type(error).__name__}: {reason}); where there is no network, give the path of "
            f"a {FILE}, or of a folder that holds one.{nearest(name, ['bytes', 'gpt2'])}"
        ) from None
    return Path(found).read_text("utf-8")
