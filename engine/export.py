"""A checkpoint as a folder of transformers: weights, config, tokenizer, and a page about it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from geon.data import ByteCodec, Codec
from geon.engine import card
from geon.engine.saved import Saved
from geon.errors import UsageError
from geon.models import LanguageModel, hf
from geon.models.fold import folded

NEAR = 1e-4
"""How far logits of the exported folder may be from ours."""

WEIGHTS = "model.safetensors"
_PROBE = "def area(r):\n    return 3.14 * r**2  # caf\u00e9, \u6f22\n"


def export(saved: Saved, out: Path) -> list[str]:
    """Write a folder that transformers loads without code of ours, and hold it against the model.

    Everything is written beside `out` first, and takes its name once logits and ids agree.

    Returns: lines on what was written.

    Raises:
        UsageError: a model that transformers has not, names the key; `out` is there already; no
            transformers; logits or ids that do not agree.
    """
    config = hf.map_of(saved.model).config(saved.model.shape)
    model = folded(saved.model)
    if out.exists():
        raise UsageError(f"--out '{out}' is there already; name a new folder")
    aside = out.with_name(f"{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write_model(model, config, saved.codec, aside)
        far = _furthest(saved.model, aside)
        if not far <= NEAR:
            raise UsageError(
                f"logits of the exported folder are up to {far:.2g} from those of "
                f"'{saved.path}', more than {NEAR:g}: nothing was written"
            )
        said = [f"logits agree within {far:.1e}"]
        said += [_write_tokenizer(saved.codec, aside)]
        (aside / "README.md").write_text(page(saved))
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return said


def _transformers(what: str) -> Any:
    """A class of transformers by its name."""
    try:
        import transformers
    except ImportError:
        raise UsageError("export needs transformers: pip install 'geon[hf]'") from None
    found = getattr(transformers, what, None)
    if found is None:
        raise UsageError(
            f"transformers {transformers.__version__} has no {what}: pip install -U transformers"
        )
    return found


def _write_model(
    model: LanguageModel, config: Mapping[str, Any], codec: Codec | None, folder: Path
) -> None:
    name, _ = hf.map_of(model).kind(model.shape)
    made = _transformers(name).config_class(
        **config,
        architectures=[name],
        dtype="float32",
        pad_token_id=None,
        bos_token_id=codec.eot if codec else None,
        eos_token_id=codec.eot if codec else None,
    )
    made.save_pretrained(folder)
    from safetensors.torch import save_file

    weights = {key: weight.float().cpu() for key, weight in hf.exported(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def _furthest(model: LanguageModel, folder: Path) -> float:
    """Largest difference of logits between a model and an exported folder, on drawn ids."""
    other = _transformers("AutoModelForCausalLM").from_pretrained(folder, dtype=torch.float32)
    shape, device = model.shape, model.head_weight.device
    drawn = torch.Generator().manual_seed(0)
    time = min(shape.context, 256)
    ids = torch.randint(shape.vocab_size, (2, time), generator=drawn)
    theirs = other.eval().to(device)(ids.to(device)).logits
    return float((model(ids.to(device)) - theirs).abs().max())


def _write_tokenizer(codec: Codec | None, folder: Path) -> str:
    if codec is None:
        return "no tokenizer: the text of the run's ids is not known"
    try:
        from geon.data.bpe import standalone
    except ImportError:
        return "no tokenizer: it needs the 'tokenizers' package, pip install 'geon[data]'"
    (folder / "tokenizer.json").write_text(standalone(codec), "utf-8")
    # The byte 0, which stands between documents of bytes, is no special token: it would take the
    # character that is its symbol out of every text.
    special = codec.eot if not isinstance(codec, ByteCodec) else None
    loaded = _transformers("PreTrainedTokenizerFast")(
        tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    if special is not None:
        token = loaded.convert_ids_to_tokens(special)
        loaded.eos_token = loaded.bos_token = token
    loaded.save_pretrained(folder)
    again = _transformers("AutoTokenizer").from_pretrained(folder)
    ids, ours = again(_PROBE, add_special_tokens=False)["input_ids"], codec.encode(_PROBE).tolist()
    if ids != ours:
        raise UsageError(
            f"the exported tokenizer cuts {_PROBE!r} into {ids[:8]}..., the run's into "
            f"{ours[:8]}...: nothing was written"
        )
    return f"tokenizer of {len(again):,} ids"


def page(saved: Saved) -> str:
    """README.md of an exported folder: how it is loaded, and the run's card."""
    facts = saved.facts
    step = f"Weights of step {facts['step']:,}"
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation"),
        *("tags:", "- geon", "---", ""),
        *("```python", "from transformers import AutoModelForCausalLM", ""),
        *('model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")', "```", ""),
    ]
    try:
        found = json.loads((saved.run / card.CARD).read_text())
    except (OSError, ValueError):
        return "\n".join([*lines, f"{step} of a run that has no run card yet.", ""])
    return "\n".join([*lines, f"{step} of the run below.", "", card.page(found)])
