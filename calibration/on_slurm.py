"""A campaign on a Slurm cluster: an array of jobs with one card each, through submitit, which is imported when it is asked for.

Jobs share a folder and nothing else: each appends to a file of its own, and `vramplan calibrate merge` puts them together.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.shards import Shard
from estimator.errors import RequestError


def command(campaign: str, out: Path, shard: Shard, arguments: Sequence[str] = ()) -> list[str]:
    """What a job runs: its share of a campaign.

    Args:
        campaign: name, or the path of a file that the nodes see.
        out: file of its records.
        shard: its share.
        arguments: further ones of `vramplan calibrate run`.
    """
    own = ["--campaign", campaign, "--out", str(out), "--shard", str(shard)]
    return [sys.executable, "-m", "app", "calibrate", "run", *own, *arguments]


def records_of(folder: Path, shard: Shard) -> Path:
    """Where the records of a share lie."""
    return folder / f"records-{shard.number}-of-{shard.of}.jsonl"


def run_share(campaign: str, folder: str, number: int, of: int, arguments: list[str]) -> int:
    """One job: plain values come in, since submitit pickles them; the exit code of its command goes out."""
    shard = Shard(number=number, of=of)
    return subprocess.run(command(campaign, records_of(Path(folder), shard), shard, arguments), check=False).returncode


def submit(
    campaign: str,
    folder: Path,
    *,
    num_jobs: int,
    minutes: float,
    arguments: Sequence[str] = (),
    cluster: str | None = None,
    gpus: int = 1,
    options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Submits one job a share.

    Args:
        campaign: as above.
        folder: that all nodes see, for records and logs.
        num_jobs: shares.
        minutes: that a job may take.
        arguments: further ones of `vramplan calibrate run`.
        cluster: `slurm`, `local` (processes on this machine) or `debug` (in this process, one after another); None for what submitit finds.
        gpus: cards of a job.
        options: further ones of submitit, such as `slurm_partition`.

    Returns:
        submitit's jobs.

    Raises:
        RequestError: if submitit is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise RequestError("slurm: submitit is not installed; `pip install 'vramplan[cluster]'` brings it", field="slurm") from None
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=str(folder / "logs"), cluster=cluster)
    executor.update_parameters(name="vramplan", timeout_min=round(minutes) + 5, gpus_per_node=gpus, cpus_per_task=4, **(options or {}))
    with executor.batch():
        return [
            executor.submit(run_share, campaign, str(folder), number, num_jobs, ["--minutes", f"{minutes:g}", *arguments])
            for number in range(1, num_jobs + 1)
        ]
