"""One rank of the job of `trebuchet doctor --cluster`: marks that it has begun, and only then loads torch and looks.

python -m trebuchet.training.doctor_job FOLDER        writes FOLDER/report.json; the process group is as for a worker
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..launcher import started


def main(folder: str) -> int:
    started.mark(Path(folder))
    from .allocation import report_of

    return report_of(Path(folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
