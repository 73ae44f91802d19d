"""What this machine has and lacks: `python -m geon.scripts.doctor`, `--json` for programs.

`--measure FILE.json` measures its speeds instead (scripts/measure.py).

Takes about ten seconds, longer when a collective hangs. The exit status is 1 when torch or the
collective check fails, else 0.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from geon.launch.leave import guard

REQUIRED = ("torch", "numpy", "hydra-core", "omegaconf", "tqdm", "matplotlib")
OPTIONAL = {
    "transformers": ("Hugging Face models", "hf"),
    "datasets": ("data=stream, parquet", "data"),
    "tokenizers": ("data.bpe_vocab", "data"),
    "deepspeed": ("DeepSpeed ZeRO", "deepspeed"),
    "wandb": ("logger=wandb", "wandb"),
    "tensorboard": ("logger=tensorboard", "tensorboard"),
    "pytorch-optimizer": ("baseline optimizers", "baselines"),
}
"""Package -> the feature it serves, and the extra that installs it."""
_COLLECTIVE_SECONDS = 30.0
_ROUNDS = 5
_MATMUL_SECONDS = 0.25


def version(package: str) -> str | None:
    """Installed version, read without importing the package; None when it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_error() -> str | None:
    """Why torch cannot be imported; None when it can."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def cpu() -> dict[str, Any]:
    """Cores, hardware threads, and whether bf16 products have instructions (else: emulated)."""
    import torch

    from geon.engine.metrics import bf16_instructions, cpu_flags

    known = getattr(os, "sched_getaffinity", None)
    flags = cpu_flags()
    return {
        "cores": flags.get("num_physical_cores"),
        "threads": os.cpu_count(),
        "usable_threads": len(known(0)) if known else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "bf16": bf16_instructions() if any("bf16" in name for name in flags) else None,
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory and bf16 support of each CUDA device."""
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        bf16 = facts.major >= 8
        memory = round(facts.total_memory / 2**30, 1)
        found.append({"name": facts.name, "memory_gib": memory, "bf16": bf16})
    return found


def matmul_rate(device: str, dtype: str) -> float:
    """GFLOP/s of square products, measured for a quarter of a second."""
    import torch

    n = 512 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    wait = torch.cpu.synchronize if device == "cpu" else torch.cuda.synchronize
    a @ a
    wait()
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _MATMUL_SECONDS:
        a @ a
        wait()
        count += 1
    return 2 * n**3 * count / (time.perf_counter() - begin) / 1e9


def _timed_exchange(rank: int, device: str) -> float:
    """Seconds to sum over two ranks and send uneven pieces both ways; raises on a wrong number."""
    import torch
    import torch.distributed as dist

    begin = time.perf_counter()
    total = torch.full((1 << 16,), rank + 1.0, device=device)
    dist.all_reduce(total)
    outgoing, incoming = ([1, 2], [1, 3]) if rank == 0 else ([3, 4], [2, 4])
    sent = torch.full((sum(outgoing),), float(rank), device=device)
    got = torch.empty(sum(incoming), device=device)
    dist.all_to_all_single(got, sent, incoming, outgoing)
    if not (total == 3.0).all() or got.tolist() != [0.0] * incoming[0] + [1.0] * incoming[1]:
        raise RuntimeError("a collective returned wrong numbers")
    return time.perf_counter() - begin


def least_exchange(rank: int, device: str) -> float:
    """Milliseconds of one sum and one exchange, at best."""
    return 1000 * min(_timed_exchange(rank, device) for _ in range(_ROUNDS))


def _one_of_two(rank: int, work: Callable[[int, str], Any], backend: str, folder: str) -> None:
    """One of the two processes; the first writes what it found."""
    import torch.distributed as dist

    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=_COLLECTIVE_SECONDS),
    )
    found = work(rank, device)
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    dist.destroy_process_group()


def collective(backend: str, seconds: float = _COLLECTIVE_SECONDS) -> dict[str, Any]:
    """Whether two processes can sum and exchange uneven pieces.

    Returns:
        {"ok": True, "milliseconds": of one of each, at best} or {"ok": False, "error": ...}.
    """
    found = in_two_processes(least_exchange, backend, seconds)
    return {"ok": True, "milliseconds": found.pop("found")} if found["ok"] else found


def in_two_processes(
    work: Callable[[int, str], Any], backend: str, seconds: float = _COLLECTIVE_SECONDS
) -> dict[str, Any]:
    """What a function (rank, device) finds on the first of two ranks.

    Returns:
        {"ok": True, "found": what it returned, through JSON} or {"ok": False, "error": ...}.
    """
    from torch.multiprocessing.spawn import (
        ProcessExitedException,
        ProcessRaisedException,
        start_processes,
    )

    with tempfile.TemporaryDirectory() as folder:
        ranks = start_processes(  # type: ignore[no-untyped-call]
            _one_of_two, (work, backend, folder), nprocs=2, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + seconds
        try:
            while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    return {"ok": False, "error": f"no answer in {seconds:.0f} s"}
        except (ProcessRaisedException, ProcessExitedException) as error:
            return {"ok": False, "error": str(error).strip().splitlines()[-1]}
        finally:
            for process in ranks.processes:
                process.kill()
        return {"ok": True, "found": json.loads(Path(folder, "found").read_text())}


def free_disk(folder: Path) -> float:
    """GiB free where a folder is or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / 2**30


def examine() -> dict[str, Any]:
    """Everything that is printed, as JSON."""
    compilers = (shutil.which(name) for name in ("g++", "clang++", "c++"))
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "required": {name: version(name) for name in REQUIRED},
        "optional": {name: version(name) for name in OPTIONAL},
        "compiler": next((path for path in compilers if path), None),
        "runs_free_gib": round(free_disk(Path("runs")), 1),
        "torch_error": torch_error(),
    }
    if facts["torch_error"] is None:
        found = gpus()
        places = ["cpu", "cuda"] if found else ["cpu"]
        rates = {p: {d: matmul_rate(p, d) for d in ("float32", "bfloat16")} for p in places}
        backends = ["gloo", "nccl"] if len(found) >= 2 else ["gloo"]
        facts |= {"cpu": cpu(), "gpus": found, "matmul_gflops": rates}
        facts["collectives"] = {name: collective(name) for name in backends}
    facts["missing"] = missing(facts)
    return facts


def missing(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What is absent, the feature that wants it, and how to get it."""
    rows = [
        (name, "everything", "pip install torch")
        if name == "torch"
        else (name, "training", "pip install 'geon[train]'")
        for name, found in facts["required"].items()
        if found is None
    ]
    for name, found in facts["optional"].items():
        if found is None:
            feature, extra = OPTIONAL[name]
            rows.append((name, feature, f"pip install 'geon[{extra}]'"))
    if facts["compiler"] is None:
        how = "install g++ or clang++ with the system's packages"
        rows.append(("C++ compiler", "parallel.compile and DeepSpeed on a CPU", how))
    if not facts.get("gpus"):
        rows.append(("CUDA GPU", "nccl and fast bf16", "without one, runs use gloo on the CPU"))
    for name, result in facts.get("collectives", {}).items():
        if not result["ok"]:
            how = f"set {name.upper()}_SOCKET_IFNAME to a network interface, e.g. lo"
            rows.append((f"working {name}", "more than one rank", how))
    return [dict(zip(("what", "feature", "how"), row, strict=True)) for row in rows]


def render(facts: dict[str, Any]) -> str:
    """The page for people."""
    sections = {
        "versions": [("python", facts["python"])]
        + [(name, found or "missing") for name, found in facts["required"].items()],
        "optional": [
            (name, f"{found or 'missing':<12} {OPTIONAL[name][0]}")
            for name, found in facts["optional"].items()
        ],
        "machine": _machine_rows(facts),
        "missing": [(row["what"], f"{row['feature']}: {row['how']}") for row in facts["missing"]]
        or [("nothing", "")],
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {label:<18} {value}".rstrip() for label, value in rows), ""]
    return "\n".join(lines[:-1])


def _machine_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("compiler", facts["compiler"] or "none"),
            ("disk for runs", f"{facts['runs_free_gib']} GiB free")]  # fmt: skip
    if facts["torch_error"] is not None:
        return [*rows, ("torch", facts["torch_error"])]
    own = facts["cpu"]
    told = (
        f"{own['cores'] or '?'} cores, {own['usable_threads']} of {own['threads']} threads usable"
    )
    rows.append(("cpu", f"{told}, torch uses {own['torch_threads']}, {_bf16(own['bf16'])}"))
    for i, gpu in enumerate(facts["gpus"]):
        rows.append((f"gpu {i}", f"{gpu['name']}, {gpu['memory_gib']} GiB, {_bf16(gpu['bf16'])}"))
    for place, rates in facts["matmul_gflops"].items():
        told = ", ".join(f"{dtype} {rate:,.0f} GFLOP/s" for dtype, rate in rates.items())
        rows.append((f"matmul on {place}", told))
    for name, result in facts["collectives"].items():
        told = f"ok, {result['milliseconds']:.1f} ms" if result["ok"] else result["error"]
        rows.append((f"{name}, 2 processes", told))
    return rows


def _bf16(native: bool | None) -> str:
    return {True: "bf16", False: "bf16 emulated", None: "bf16 unknown"}[native]


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m geon.scripts.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--measure",
        metavar="FILE.json",
        help="measure speeds instead, for shard.machine=FILE.json; under torchrun, of all ranks",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="of --measure")
    told = parser.parse_args(arguments)
    if told.measure is not None:
        from geon.scripts import measure

        return measure.main(told.measure, told.device or "auto")
    if told.device is not None:
        parser.error("--device goes with --measure")
    facts = examine()
    print(json.dumps(facts, indent=2) if told.json else render(facts))
    healthy = facts["torch_error"] is None and all(r["ok"] for r in facts["collectives"].values())
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(guard(lambda: main(sys.argv[1:])))
