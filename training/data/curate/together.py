"""The blocks of a large source made by several processes of this machine, for one that then puts them together (`rows.py`).

Reading JSON, finding words and hashing them is Python and numpy on one core each. The others are plain child processes that are
told what to do on their standard input: forking one that runs threads can hang, and `multiprocessing` would import the user's
script again. Left out: other machines, which `data prepare --shards` is for.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....launcher.errors import TrebuchetError
from ....launcher.schema import Source
from ....launcher.schema_curate import Curate
from .. import samples as of_samples

if TYPE_CHECKING:
    from .rows import Maker

LARGE_BYTES = 64 << 20  # of a source; a child takes a second to start, as long as 4 MB of rows
REFUSED = 2  # exit code of a child that came to data which will be refused
_MOST = 8  # processes; each reads the whole source, so more of them gain little


def blocks(maker: Maker, samples: of_samples.Samples, content: str, *, filtered: bool) -> None:
    """Makes the entries of all blocks of `samples`, if it is large. One that a child leaves out, killed or by an error, is made (and
    its error raised) by who puts them together."""
    count = min(len(os.sched_getaffinity(0)), _MOST)
    if count < 2 or sum(file.stat().st_size for file in samples.table.files) < LARGE_BYTES:
        return
    job = {
        "curate": maker.curate.model_dump(mode="json"),
        "skip_bad_rows": maker.skip,
        "cache": str(maker.cache.parent),
        "source": samples.source.model_dump(mode="json"),
        "kind": samples.kind,
        "roles": samples.roles,
        "content": content,
        "filtered": filtered,
        "block": of_samples.BLOCK,
        "count": count,
    }
    children = []
    try:
        for number in range(1, count):
            # Not by -m, which would load this module a second time, because its package imports it.
            words = [sys.executable, "-c", f"from {__name__} import child; child()", str(number)]
            child = subprocess.Popen(words, stdin=subprocess.PIPE)
            children.append(child)
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # one that ended already is seen below
                child.stdin.write(json.dumps(job).encode())
                child.stdin.close()
        maker.part(samples, content, lambda block: block % count == 0, filtered=filtered)
        for number, child in enumerate(children, start=1):
            if child.wait() not in (0, REFUSED):
                print(
                    f"trebuchet: process {number} of {count} ended with {child.returncode}; its rows are read here",
                    file=sys.stderr,
                )
    finally:
        for child in children:
            child.kill()
            child.wait()


def child() -> None:
    """What the others run: argument 1 is which of them this is, standard input the job."""
    number, job = int(sys.argv[1]), json.load(sys.stdin)
    try:
        _blocks_of(number, job)
    except TrebuchetError:  # the process that started this one comes to the same row, and says so
        sys.exit(REFUSED)


def _blocks_of(number: int, job: dict[str, Any]) -> None:
    from ..tables import open_table
    from .rows import Maker

    of_samples.BLOCK = job["block"]
    source = Source.model_validate(job["source"])
    samples = of_samples.Samples(open_table(source), source, kind=job["kind"], roles=tuple(job["roles"]))
    maker = Maker(Curate.model_validate(job["curate"]), skip_bad_rows=job["skip_bad_rows"], cache=Path(job["cache"]))
    maker.part(samples, job["content"], lambda block: block % job["count"] == number, filtered=job["filtered"])
