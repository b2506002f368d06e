"""status: report how a run of a pipeline ended, whatever stopped it."""

import logging
import os
import time

from automerge.spec import Spec
from automerge.telemetry.metrics import GATEWAY_VARIABLE, StageMetrics

log = logging.getLogger(__name__)

SUCCEEDED = "SUCCEEDED"
"""The state of a run without a failed task, in capital letters; the engines have several words for the others."""


def report_status(spec: Spec, state: str, *, run: str = "", message: str = "") -> bool:
    """Log how a run ended and push it to the gateway named by ``AUTOMERGE_PUSHGATEWAY``, if there is one.

    A gateway that does not answer is logged and no error. A failed run leaves the time of the last success as it was.

    Args:
        spec: the run's spec.
        state: the engine's word for how the run ended; only ``succeeded``, in any case, is a success.
        run: the engine's name of the run.
        message: what the engine says of the failure.

    Returns:
        Whether the run succeeded.
    """
    succeeded = state.upper() == SUCCEEDED
    told = f"run {run or 'of ' + spec.name} ended: {state.lower()}{f' ({message})' if message else ''}"
    if succeeded:
        log.info("%s", told)
    else:
        log.error("%s", told)
    metrics = StageMetrics("run", spec.name, spec.model.target, os.environ.get(GATEWAY_VARIABLE) or None)
    now = time.time()
    metrics.set("automerge_run_last_end_timestamp_seconds", now)
    metrics.set("automerge_run_last_success", float(succeeded))
    if succeeded:
        metrics.set("automerge_run_last_success_timestamp_seconds", now)
    metrics.push()
    return succeeded
