"""Bad input in bulk: make fuzz, or python -m geon.benches.fuzz --count 2000 --json FILE.

Each case is one command line of train.py, drawn from a seed: composed and checked in this process,
and some also by a real one. It must be a run that is what it says, or one line that names what to
change (exit status 2), within ten seconds.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from geon.benches import results
from geon.configs.check import groups, keys
from geon.configs.overrides import check_overrides, flat, kind_of
from geon.configs.schema import Config
from geon.engine.checks import check
from geon.engine.planning import report_plan
from geon.errors import UsageError, shown
from geon.launch.compose import compose
from geon.launch.leave import guard
from geon.launch.local import PROGRAM
from geon.scripts.flags import whole

TINY = [
    "data=synthetic",
    "data.tokens=4000",
    "data.val_tokens=64",
    "data.batch_tokens=64",
    "model.n_layer=1",
    "model.d_model=16",
    "model.n_head=2",
    "model.context=16",
    "schedule.steps=1",
    "parallel=single",
    "device=cpu",
]
SLOW = 10.0
LEAVES = [key for key in keys() if not is_dataclass(kind_of(key))]
NODES = [key for key in keys() if is_dataclass(kind_of(key))]
NUMBERS = "0 1 2 3 7 -1 -5 0.5 1.5 1e-30 1e30 1e400 1e5 nan inf -inf 4096 1000000000000 0x10 1_000"
NUMBERS += " 99999999999999999999999 true false null 007 +3 1e-8 0.999 100 50304"
WORDS = "spectral spectrall stiefel adamw cpu cuda none auto never x ../x /tmp/x ~ ~/x . .. a.b a/b"
WORDS += (
    " yes NO '' \"\" '???' bf16 fp32 'two words' José \"José\" 名 \"\\n\" a=b a,b a;b $(id) `id`"
)
WORDS += " /dev/null /proc/self/mem /etc/passwd /etc/ssh %s {} [] [1] [a,b] {a:1} {a:{b:1}} *"
HOSTILE = (
    "${oc.env:HOME}",
    "'${oc.env:SECRET,none}'",
    "${oc.decode:'1'}",
    "${hydra:runtime.cwd}",
    "${hydra.run.dir}",
    "${oc.create:{a:1}}",
    "${${optim.name}}",
    "${oc.dict.values:optim}",
    "${name}",
    "${output}",
    "${nope}",
    "${.lr}",
    "{_target_: os.system, command: id}",
    "{_target_: pathlib.Path.write_text}",
    "'../../escape'",
    '"a\\u0000b"',
)
ELSEWHERE = (
    "+hydra.callbacks.x._target_=os.getcwd",
    "hydra.job_logging={}",
    "hydra/launcher=basic",
    "hydra/sweeper=optuna",
    "+hydra.searchpath=[file:///tmp]",
    "hydra.sweep.dir=/tmp/x",
    "hydra.run.dir=/tmp/x",
    "hydra.output_subdir=x",
    "hydra.mode=MULTIRUN",
    "+_target_=os.system",
    "+optim._target_=os.system",
    "optim@hidden=muon",
    "optim@_global_=muon",
    "--config-path=/tmp",
    "--config-name=x",
    "--config-dir=/nope",
    "--experimental-rerun=x",
    "--nothing",
    "-x",
    "--multirun",
)


@dataclass
class Case:
    """One command line and what came of it.

    Attributes:
        kind: of the draw.
        typed: the arguments beyond TINY.
        outcome: clean, accepted, silent, hydra, traceback, slow, unnamed.
        said: the message.
    """

    kind: str
    typed: list[str]
    outcome: str = ""
    said: str = ""
    seconds: float = 0.0


def draw(rng: random.Random) -> Case:
    """One case."""
    kinds: dict[str, Callable[[random.Random], list[str]]] = {
        "value": lambda r: [f"{r.choice(LEAVES)}={_value(r)}"],
        "near": _near,
        "pair": lambda r: [f"{r.choice(LEAVES)}={_value(r)}", *_near(r)],
        "group": _group,
        "prefix": lambda r: [f"{r.choice(['+', '++', '~'])}{r.choice(LEAVES)}={_value(r)}"],
        "node": lambda r: [f"{r.choice(NODES)}={_value(r)}"],
        "mapping": _mapping,
        "grammar": _grammar,
        "typo": _typo,
        "hostile": lambda r: [f"{r.choice(LEAVES)}={r.choice(HOSTILE)}"],
        "elsewhere": lambda r: [r.choice(ELSEWHERE)],
    }
    kind = rng.choice([*kinds, "value", "near", "pair", "near"])
    return Case(kind, [text.replace("\x00", "") for text in kinds[kind](rng)])


def _value(rng: random.Random) -> str:
    return rng.choice((*NUMBERS.split(), *WORDS.split(" "), *HOSTILE))


def _near(rng: random.Random) -> list[str]:
    """A value of the right type, far from all reason or near it."""
    key = rng.choice(LEAVES)
    kind = kind_of(key)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [f"{key}={rng.choice([*kind]).value}"]
    if bool in {kind, *get_args(kind)}:
        return [f"{key}={rng.choice(['true', 'false', '2', '-1', '0.5', 'yes'])}"]
    if kind is int:
        return [f"{key}={rng.choice([0, 1, 2, 3, -1, 5, 64, 10**5, 10**9, 2**31, 2**63, 10**30])}"]
    if kind is float:
        scale = rng.choice([0.0, 1e-30, 1e-3, 0.1, 0.9, 1.0, 2.0, 1e3, 1e30, -1.0])
        return [f"{key}={scale * rng.choice([1.0, rng.random()]):g}"]
    if get_origin(kind) is list:
        return [f"{key}=[{','.join(rng.choice(NUMBERS.split()) for _ in range(rng.randrange(4)))}]"]
    return [f"{key}={rng.choice(WORDS.split(' '))}"]


def _group(rng: random.Random) -> list[str]:
    group = rng.choice([*groups()])
    option = rng.choice([*groups()[group], _value(rng)])
    return [f"{group}={option}", *_near(rng)]


def _mapping(rng: random.Random) -> list[str]:
    place = rng.choice(["optim.overrides", "sweep.arms", "sweep.grid", "optim.hidden.finishes"])
    place = rng.choice([place, "optim.hidden.options", "optim.hidden.manifold_options"])
    name = rng.choice(["q", "hidden", "qk", "row_cap", "_target_", "a.b", "axis", "1"])
    word = rng.choice(["a", "most", "axis", "lr", "1"])
    inner = rng.choice(
        [_value(rng), f"{{pattern: '*', lr: {_value(rng)}}}", f"{{{word}: {_value(rng)}}}"]
    )
    return [rng.choice([f"+{place}.{name}={inner}", f"+{place}={{{name}: {inner}}}"])]


def _grammar(rng: random.Random) -> list[str]:
    text = f"{rng.choice(LEAVES)}={_value(rng)}"
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice("[]{}()'\"\\=,:;@~+-$%&#!? \téß漢\ud800\x01.") + text[at:]
    return [rng.choice([text, text[: rng.randrange(len(text))], text * 50])]


def _typo(rng: random.Random) -> list[str]:
    key = rng.choice(keys())
    at = rng.randrange(len(key))
    return [f"{key[:at]}{rng.choice('qzx._')}{key[at + rng.randrange(2) :]}=1"]


def judge(case: Case, output: Path) -> Case:
    """Compose and check a case in this process, and say what came of it."""
    before, start = sorted(output.rglob("*")), time.perf_counter()
    flags = [text for text in case.typed if text.startswith("-")]
    words = [*TINY, f"output={output}", *(t for t in case.typed if not t.startswith("-"))]
    try:
        if flags:
            from geon.launch.arguments import read_arguments

            read_arguments([*words, *flags])
        config = compose(words, "train")
        if config.mode.value == "plan":
            report_plan(config, config.plan.world_size or 1)
        check(config, config.plan.world_size or 1)
        case.outcome = "accepted"
        if reason := _silent(config, case.typed, words):
            case.outcome, case.said = "silent", reason
    except UsageError as error:
        case.said = str(error)
        lines = case.said.count("\n") == 0 and case.said.isprintable()
        case.outcome = "clean" if lines and _names(case) else "unnamed"
    except Exception as error:
        module = type(error).__module__.split(".")[0]
        case.outcome = "hydra" if module in ("hydra", "omegaconf", "antlr4") else "traceback"
        case.said = f"{type(error).__name__}: {str(error)[:300]}"
    case.seconds = time.perf_counter() - start
    if case.seconds > SLOW:
        case.outcome = "slow"
    if sorted(output.rglob("*")) != before:
        case.outcome, case.said = "silent", f"wrote into the output folder; {case.said}"
    return case


def _names(case: Case) -> bool:
    """Whether a message names a key or flag that was typed, or quotes the begin of an argument.

    Where a rule is made, a message gives its place and the word apart: "optim.hidden: eps ...".
    """
    for text in case.typed:
        key = shown(text.partition("=")[0].lstrip("+~-").split("@")[0])
        group = f"{key.split('.')[0]}={text.partition('=')[2]}"  # parallel.layout=hsdp
        if (key and key in case.said) or shown(text)[:100] in case.said or group in case.said:
            return True
        route, words = ".".join(key.split(".")[:2]), key.split(".")[2:]
        words += re.findall(r"(\w+):", text)
        apart = any(re.search(rf"\b{re.escape(word)}\b", case.said) for word in words)
        if key.count(".") > 1 and route in case.said and apart:
            return True
    return False


def _silent(config: Config, typed: Sequence[str], words: Sequence[str]) -> str:
    """Which typed key changed nothing though its value is new; '' where each did."""
    if any(text.startswith("-") for text in typed):
        return ""
    for text in typed:
        (override,) = check_overrides([text])
        if override.is_delete() or override.key_or_group in groups():
            continue
        for key, value in flat(override.value(), override.key_or_group):
            if value in (0, False, None, "", [], {}) or isinstance(value, dict):
                continue
            try:
                without = compose([word for word in words if word != text])
                same = _facts(config) == _facts(without)
            except UsageError:
                continue  # the key is what makes it a run
            if same and _at(without, key) != _at(config, key):
                return f"{key}={value} changes nothing that is built"
    return ""


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part)
    return config


def _facts(config: Config) -> str:
    """What is made of a config: rules and models as they are built, everything else as it is."""
    from geon.engine import build
    from geon.engine.sharding import make_sharding

    model = build.make_model(config.model)
    routing = build.make_routing(model, config.optim)
    used = {
        name: (one.lr, one.cooldown, one.idle, one.per_head, one.init)
        for name, one in routing.configs.items()
    }
    optim = config.optim
    loose = (optim.max_norm, optim.nonfinite, optim.momentum_dtype, optim.record_pairs)
    rest = {k: v for k, v in asdict(config).items() if k not in ("model", "optim")}
    built = (model.shape, model.arch, routing.rules, routing.assigned, used, make_sharding(config))
    return repr((built, loose, optim.compile, optim.name, rest))


def by_process(case: Case, folder: Path) -> str:
    """Run a case as a user would; '' where it ends as it should, else what was wrong."""
    output = folder / "runs"
    words = [*TINY, f"output={output}", *case.typed]
    try:
        done = subprocess.run(
            [sys.executable, *PROGRAM, *words],
            cwd=folder,
            capture_output=True,
            timeout=120,
            check=False,
        )
    except (ValueError, UnicodeError):
        return ""  # no process can be given such an argument
    except subprocess.TimeoutExpired:
        return "slow"
    said = done.stderr.decode(errors="replace")
    if done.returncode == 2:
        lines = said.strip().splitlines()
        one = len(lines) == 1 and lines[0].startswith("geon: error: ")
        left = [p for p in folder.rglob("*") if p.is_file()]
        return "" if one and not left else f"exit 2, {len(lines)} lines, {len(left)} files: {said}"
    if done.returncode == 0:
        return "" if "Traceback" not in said else said
    return "" if "not finite" in said else f"exit {done.returncode}: {said[-500:]}"


def fuzz(count: int, seed: int, processes: int = 0) -> tuple[list[Case], list[str]]:
    """Judge `count` cases; of every outcome, some by real processes."""
    rng = random.Random(seed)
    cases, wrong = [], []
    with tempfile.TemporaryDirectory() as output:
        for _ in range(count):
            case = judge(draw(rng), Path(output))
            if case.outcome == "slow":  # once more: others use this machine
                case = judge(Case(case.kind, case.typed), Path(output))
            cases.append(case)
    for case in rng.sample(cases, min(processes, count)):
        with tempfile.TemporaryDirectory() as folder:
            if reason := by_process(case, Path(folder)):
                wrong.append(f"{case.typed}: {reason}")
    return cases, wrong


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 when a case was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=whole(), default=2000)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--processes", type=whole(0), default=20, help="cases run by train.py, too")
    parser.add_argument("--json", type=Path, help="write counts and what was wrong here")
    told = parser.parse_args(arguments)
    cases, wrong = fuzz(told.count, told.seed, told.processes)
    counts = Counter(case.outcome for case in cases)
    bad = [asdict(case) for case in cases if case.outcome not in ("clean", "accepted")]
    print(json.dumps({"counts": counts, "processes": len(wrong), "seed": told.seed}))
    for one in [*bad, *wrong]:
        print(repr(one)[:600])
    if told.json:
        found = {"seed": told.seed, "counts": counts, "bad": bad, "processes": wrong}
        results.write(told.json, found)
    return 1 if bad or wrong else 0


if __name__ == "__main__":
    sys.exit(guard(main))
