"""The command `multitangent fuzz`."""

from __future__ import annotations

import json as json_
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import track

from multitangent_lab._files import write_text
from multitangent_lab._provenance import provenance
from multitangent_lab.config import FuzzConfig
from multitangent_lab.fuzz._case import KINDS, Result, Verdict, run_case

VERDICTS = get_args(Verdict)


def run_fuzz(config: FuzzConfig, *, json: bool) -> dict[str, Any]:
    """Runs the cases, stores the summary if `config.out` is given, and prints it unless `json`."""
    found = list(_results(config))
    summary = summarize(found)
    stored = {"seed": config.seed, "pending": config.pending, **summary, "provenance": provenance()}
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_text(config.out / "fuzz.json", json_.dumps(stored, indent=1) + "\n")
    if not json:
        print(_table(summary))
    return stored


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """How many cases of each kind came out how, and all that are wrong or unclear.

    Of what was refused there is one case for every message.
    """
    counts = Counter((r.kind, r.verdict) for r in results)
    refused = {
        r.detail.partition(" Found ")[0]: r for r in reversed(results) if r.verdict == "refused"
    }
    shown = [r for r in results if r.verdict in ("wrong", "unclear")]
    return {
        "cases": len(results),
        "failed": any(r.verdict == "wrong" for r in results),
        "kinds": {k: {v: counts[k, v] for v in VERDICTS} for k in KINDS},
        "found": [vars(r) for r in [*shown, *reversed(refused.values())]],
    }


def _results(config: FuzzConfig) -> Iterator[Result]:
    run = partial(run_case, config.seed, pending=config.pending)
    with _pool(config.workers) as tasks:
        yield from track(
            tasks(run, config.indices),
            "cases",
            total=len(config.indices),
            console=Console(file=sys.stderr),
            transient=True,
        )


@contextmanager
def _pool(workers: int) -> Iterator[Any]:
    """What maps a function over cases, in order: here, or in several processes."""
    threads = torch.get_num_threads()
    try:
        if workers > 1:
            with get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
                yield partial(pool.imap, chunksize=20)
        else:
            torch.set_num_threads(1)  # tiny tensors
            yield map
    finally:
        torch.set_num_threads(threads)


def _table(summary: dict[str, Any]) -> str:
    lines = [f"{'cases':12}" + "".join(f"{verdict:>9}" for verdict in VERDICTS)]
    for kind, counts in summary["kinds"].items():
        if any(counts.values()):
            lines.append(f"{kind:12}" + "".join(f"{counts[v]:9}" for v in VERDICTS))
    for r in summary["found"]:
        blocks = " > ".join(r["blocks"])
        lines.append(f"{r['verdict']} {r['index']}: {r['detail']}\n    {blocks} ({r['settings']})")
    return "\n".join(lines)
