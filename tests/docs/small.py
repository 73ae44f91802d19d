"""train.py with two small steps, whatever the length of the run that a page prints."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"schedule.steps": 2, "data.val_tokens": 2048, "eval.sample_tokens": 0, "device": "cpu"}
BATCH = "data.batch_tokens"  # what a page says is kept
PRINTS = ("--help", "mode=plan")

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word.partition("=")[0] not in SMALL]
    if not set(PRINTS) & set(words):
        words += [f"{key}={value}" for key, value in SMALL.items()]
        if not any(word.startswith(f"{BATCH}=") for word in words):
            words.append(f"{BATCH}=2048")
    sys.argv = [str(ROOT / "train.py"), *words]
    sys.path[0] = str(ROOT)
    exec(compile((ROOT / "train.py").read_text(), str(ROOT / "train.py"), "exec"))
