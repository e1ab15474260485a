"""Which trial Ray Tune starts next: the sweep's own numbers in order, each with its values when its turn comes.

One searcher for every method, so that a sweep draws the same values whatever starts it and resumes from its folder alone. Ray's own
OptunaSearch keeps its study in the driver and a pickle; here the study is made of the trials' records (launcher/sweep_search.py).
Source: ray.tune.search.Searcher. Importing this needs ray.
"""

from __future__ import annotations

from typing import Any

from ray.tune.search import Searcher

from ..launcher import record, sweep_search
from ..launcher.sweep import SweepFolder


class TrialQueue(Searcher):
    def __init__(self, sweep: SweepFolder, numbers: list[int]):
        facts = sweep.facts()
        super().__init__(metric=facts["metric"], mode=facts["mode"])
        self.sweep, self.left, self.search = sweep, list(numbers), facts["method"] == "optuna"
        self.begun: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        while self.left and not self.sweep.stop.exists():
            number = self.left.pop(0)
            if not self.search or sweep_search.decide(self.sweep, number):
                self.begun[trial_id] = number
                return {"number": number}
        finished: str = Searcher.FINISHED
        return finished

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """At once and not at the end of the sweep: a driver that is killed in between must not run it again."""
        if result and not error and not result.get("ended"):
            record.update(self.sweep.trial(self.begun[trial_id]), not_worth_it=True)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to keep: the sweep's folder has it all."""

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Nothing was kept."""
