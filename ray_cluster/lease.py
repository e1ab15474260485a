"""What Ray Train asked of the autoscaler ends with its driver, however that ends.

    python -m trebuchet.ray_cluster.lease REQUESTER JOB       started by `held`; waits for the end of its standard input

Ray Train asks through a detached actor, the AutoscalingCoordinator, which goes on asking for 180 s after the last renewal: a driver
killed with -9 left its nodes running for three minutes (measured, benchmarks/ray.py; Ray 2.60). So a small process in a session of
its own waits for the driver, and takes the request back when the driver is gone without having done so. It imports Ray only then.
Placement groups need nothing of the kind: Ray removes them with their owner.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator

END_S = 60.0  # for the dead driver's actors to be gone; seen: under a second
DONE = b"done\n"


@contextlib.contextmanager
def held(requester: str) -> Iterator[None]:
    """In a driver that is connected to Ray: while the block runs, `requester` (Ray Train: train-RUN_ID) may ask for nodes."""
    import ray

    here = ray.get_runtime_context()
    words = [sys.executable, "-m", f"{__package__}.lease", requester, here.get_job_id()]
    environment = {**os.environ, "RAY_ADDRESS": here.gcs_address}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    assert process.stdin is not None
    try:
        yield
    except BaseException:  # Ray Train may not have come to it
        process.stdin.close()
        raise
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(DONE)  # Ray Train has taken its request back
        process.stdin.close()
    process.wait()


def main(requester: str, job: str) -> int:
    if sys.stdin.buffer.read() == DONE:
        return 0
    import ray

    try:
        ray.init(
            address=os.environ["RAY_ADDRESS"], namespace="trebuchet", log_to_driver=False, logging_level=logging.ERROR
        )
    except Exception as problem:  # most often the cluster has ended with the driver, and holds nothing any more
        print(f"the cluster cannot be asked to give back what {requester} asked for: {problem}", file=sys.stderr)
        return 1
    take_back(requester, job)
    return 0


def take_back(requester: str, job: str) -> None:
    """Cancels the request once the driver's controller, which would renew it, is gone too."""
    import ray
    from ray._private import state

    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline and not any(j["JobID"] == job and j["IsDead"] for j in state.jobs()):
        time.sleep(0.1)
    with contextlib.suppress(ValueError):  # no such actor: nobody ever asked
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.cancel_request.remote(requester_id=requester), timeout=END_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
