"""SLURM executor: a job for each share, through submitit; or the same jobs as plain processes, to try it without SLURM.

For shares of minutes and hours, such as tuning runs: a share and its result are JSON here. submitit keeps the job
itself in its folder as it likes to (a pickle, read by the job it was written for); results are read from JSON alone.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from peft_combo.distributed.executor import (
    Executor,
    LostShare,
    Share,
    call_by_name,
    check_workers,
    name_function,
    open_reply,
)
from peft_combo.errors import PeftComboError

_JOBS_PER_SHARE = 3
_FAREWELL_SECONDS = 30.0


class SlurmExecutor(Executor):
    """Jobs of SLURM.

    Args:
        folder: of the jobs' logs and results, seen by every machine.
        workers: jobs that run at the same time.
        cluster: ``local`` runs the same jobs as processes of this machine.
        options: of `submitit.AutoExecutor.update_parameters`, as in ``{"timeout_min": 240, "slurm_partition": "gpu"}``.
        on_note: told of jobs that failed.
    Raises:
        PeftComboError: submitit is not installed, or this machine knows no SLURM.
    """

    def __init__(
        self, folder: Path, workers: int = 8, *, cluster: Literal["slurm", "local"] = "slurm",
        options: dict[str, Any] | None = None, on_note: Callable[[str], None] = lambda note: None,
        poll_seconds: float = 5.0,
    ) -> None:  # fmt: skip
        check_workers(workers)
        self._workers, self._folder, self._on_note, self._poll = workers, folder.absolute(), on_note, poll_seconds
        self._jobs: list[Any] = []
        submitit = _import_submitit()
        try:
            self._submitit = submitit.AutoExecutor(folder=self._folder / "jobs", cluster=cluster)
        except RuntimeError as error:
            raise PeftComboError(
                "There is no SLURM on this machine (srun is not found). Start this on a login node, or take --on local."
            ) from error
        wanted = {"timeout_min": 24 * 60, **(options or {})}
        if cluster == "slurm":
            wanted["slurm_array_parallelism"] = workers
        try:
            self._submitit.update_parameters(**wanted)
        except (NameError, TypeError, ValueError) as error:
            raise PeftComboError(f"SLURM takes no such option: {error}") from error

    @property
    def workers(self) -> int:
        """How many jobs run at the same time."""
        return self._workers

    def map_shares(
        self, function: Callable[[Share], Any], shares: Iterable[Share]
    ) -> Iterator[tuple[int, Any | LostShare]]:
        """See `Executor.map_shares`; all shares are read at once, and each is JSON."""
        name, given = name_function(function), list(shares)
        waiting, died = list(range(len(given))), [0] * len(given)
        running: dict[int, tuple[Any, Path]] = {}
        while waiting or running:
            running |= self._submit(name, {number: given[number] for number in waiting})
            waiting = []
            for number, (job, answer) in list(running.items()):
                if not job.done():
                    continue
                del running[number]
                if answer.is_file():
                    yield number, open_reply(*json.loads(answer.read_text(encoding="utf-8")))
                else:
                    died[number] += 1
                    reason = f"job {job.job_id} ended without an answer; its log: {job.paths.stderr}"
                    if died[number] == _JOBS_PER_SHARE:
                        yield number, LostShare(reason)
                    else:
                        self._on_note(f"{reason}. It is submitted again.")
                        waiting.append(number)
            if running and not waiting:
                time.sleep(self._poll)

    def close(self) -> None:
        """Cancel what still runs, and wait until it has ended, for a tuning run then writes its checkpoint."""
        running = [job for job in self._jobs if not job.done()]
        for job in running:
            job.cancel()
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline and not all(job.done() for job in running):
            time.sleep(min(self._poll, 0.2))
        self._jobs = []

    def _submit(self, name: str, shares: dict[int, Share]) -> dict[int, tuple[Any, Path]]:
        """Submit jobs as one array; return for each share its job and where the answer will be."""
        if not shares:
            return {}
        answers = {number: self._folder / "answers" / f"{secrets.token_hex(8)}.json" for number in shares}
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._submitit.batch():
            jobs = [
                self._submitit.submit(_do_job, name, json.dumps(share), str(answers[number]))
                for number, share in shares.items()
            ]
        self._jobs += jobs
        return {number: (job, answers[number]) for number, job in zip(shares, jobs, strict=True)}


def _do_job(name: str, share: str, answer: str) -> None:
    """Do one share in a job, and leave the reply as JSON: whole, by a rename, for who looks may look at any time."""
    draft = Path(f"{answer}.draft")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(call_by_name(name, json.loads(share))), encoding="utf-8")
    draft.replace(answer)


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise PeftComboError(
            "submitit is not installed. Install it with: pip install 'peft-combo[slurm]'; or take the processes of "
            "this machine: --on local"
        ) from error
    return submitit
