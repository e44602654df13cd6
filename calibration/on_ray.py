"""A campaign on a Ray cluster: one task and one card a case, each in a process of its own. Ray is imported when it is asked for."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from calibration.case import Case
from calibration.record import Record, RecordFile
from calibration.schedule import Progress
from estimator.errors import RequestError


def run(
    cases: Sequence[Case],
    *,
    measure: Callable[[Case], Record],
    records: RecordFile,
    cost: Callable[[Case], float],
    budget_seconds: float,
    lost: Callable[[Case, str], None],
    address: str | None = None,
    num_gpus: float = 1,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Runs cases where the cluster has a free card and appends each record, here, before it is told of.

    Ray names the task's card in CUDA_VISIBLE_DEVICES, so that to `measure` it is the first one. What a node takes with it when it goes
    down is not answered, and is run by the next call.

    Args:
        cases: to run, in this order.
        measure: runs one case on the first card that it sees; pickled to the nodes, which need vramplan installed.
        records: where they go.
        cost: of a case, in any unit.
        budget_seconds: after them no case is begun.
        lost: told of cases without a record, and why.
        address: of the cluster; None for the one that Ray finds, or a new one on this machine.
        num_gpus: cards a task takes; 0 for dry runs.
        clock: seconds that only grow.

    Raises:
        RequestError: if Ray is not installed, or the cluster has not one such card.
    """
    with _cluster(address) as ray:
        total = ray.cluster_resources()
        slots = int(total.get("GPU", 0) / num_gpus) if num_gpus else int(total.get("CPU", 0))
        if slots < 1:
            raise RequestError(f"ray: the cluster has {total.get('GPU', 0):g} GPUs, and a case takes {num_gpus:g}", field="ray")
        # one call a process: nothing of a case outlives it; no retries: what was lost is run by the next call
        task = ray.remote(num_gpus=num_gpus, num_cpus=1, max_calls=1, max_retries=0)(_task)
        begun = clock()
        waiting, running, num_done, spent = list(cases), dict[Any, Case](), 0, 0.0
        while waiting or running:
            while waiting and len(running) < slots and clock() - begun <= budget_seconds:
                case = waiting.pop(0)
                running[task.remote(measure, case)] = case
            if not running:
                return
            (finished, *_), _ = ray.wait(list(running), num_returns=1)
            case = running.pop(finished)
            try:
                record: Record = ray.get(finished)
            except ray.exceptions.RayError as error:
                lost(case, str(error).strip().splitlines()[-1][:300])
                continue
            records.append(record)
            num_done, spent = num_done + 1, spent + max(cost(case), 1.0)
            left = sum(max(cost(one), 1.0) for one in (*waiting, *running.values()))
            pace = (clock() - begun) / spent
            yield Progress(record=record, num_done=num_done, num_total=len(cases), remaining_seconds=pace * left)


def _task(measure: Callable[[Case], Record], case: Case) -> Record:
    return measure(case)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected; disconnected afterwards if it was not before."""
    ray = _ray()
    was_connected = ray.is_initialized()
    if not was_connected:
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
    try:
        yield ray
    finally:
        if not was_connected:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise RequestError("ray: is not installed; `pip install 'vramplan[cluster]'` brings it", field="ray") from None
    return ray
