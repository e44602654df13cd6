"""`python -m tests.coverage`: traces every causal language model that transformers builds, and writes docs/coverage.md.

--only A,B      these model types alone
--passes P,Q    of `qlora`, `full`, `lora` (checkpointing, attention as fused as the class has it), `splice`, `reach`, `rest`
--seconds N     start nothing new after N seconds
--keep          take results of other versions of our own code
--retry         trace again what was not traced
--renew         trace again what other versions traced, and keep their results of what there is no time for
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from time import monotonic

import torch
import transformers

from estimator.introspect.errors import BuildError
from tests.coverage import architectures, table
from tests.coverage.architectures import Architecture
from tests.coverage.cells import ATTENTIONS, Cell, SlowError, cells, limit, outcome, reach, splice_difference
from tests.coverage.records import Records

PASSES = ("qlora", "full", "lora", "splice", "reach", "rest")


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    records = Records(any_stamp=options.keep or options.renew)
    start = monotonic()
    names = tuple(options.only.split(",")) if options.only else architectures.names()
    for name, found in architectures.built(names):
        if isinstance(found, BuildError):
            records.results[name] = {"built": False, "reason": found.message}
        else:
            records.results[name] = {"built": True, "layers": found.inventory.num_layers, "cells": len(list(cells(found)))}
    for chosen in options.passes.split(","):
        for name in names:
            if monotonic() - start > options.seconds:
                break
            if records.results[name]["built"]:
                _trace(architectures.architecture(name), chosen, records, retry=options.retry, renew=options.renew)
    records.tidy()
    text = table.markdown(records.results, of_other_code=records.of_other_code)
    if not options.only:
        table.FILE.write_text(text)
    print(table.summary(records.results))
    return 0


def _trace(architecture: Architecture, chosen: str, records: Records, *, retry: bool, renew: bool) -> None:
    for key, cell in _wanted(architecture, chosen):
        known = records.results.get(key)
        is_wanted = (renew and records.is_of_other_code(key)) or (
            retry and known is not None and known["outcome"] not in ("traced", "refused")
        )
        if known is not None and not is_wanted:
            continue
        result = _checked(architecture, cell, chosen) if chosen in ("reach", "splice") else asdict(outcome(architecture, cell))
        records.add(key, result)
        print(key, result, flush=True)


def _wanted(architecture: Architecture, chosen: str) -> Iterator[tuple[str, Cell]]:
    possible = list(cells(architecture))
    own = next(a for a in reversed(ATTENTIONS) if any(cell.attention is a for cell in possible))
    for cell in possible:
        is_first = cell.attention is own and cell.checkpointing
        if chosen in ("reach", "splice"):
            if is_first and cell.method == "full":
                yield f"{architecture.name}/{chosen}", cell
        elif (is_first and cell.method == chosen) or (not is_first and chosen == "rest"):
            yield f"{architecture.name}/{cell.key}", cell


def _checked(architecture: Architecture, cell: Cell, chosen: str) -> dict[str, object]:
    check = reach if chosen == "reach" else splice_difference
    try:
        with limit():
            try:
                value = check(architecture, cell)
            except BuildError:  # some classes refuse to be checkpointed
                value = check(architecture, replace(cell, checkpointing=False))
        return {"value": value, "outcome": "traced"}
    except SlowError:
        return {"outcome": "slow"}
    except BuildError as error:
        return {"outcome": "failed", "reason": error.message}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage")
    parser.add_argument("--only", default="")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--renew", action="store_true")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
