"""The probe of a deep model from three shallow ones: what each moment of a step holds, and how that grows with the layers.

All decoder layers of a model are alike, so what is alive between two marks of a step (the beginning of a layer's forward pass, the end
of its backward pass) is a constant, a share for each layer of the model (weights, states, kept activations) and a share for each layer
passed. Seen from the first layer, or from the last, it is linear in the depth, each mark for itself; the peak, which is the highest of
them, is not, and is taken after. Three depths, so that it is seen and not assumed: where one mark is not on a line, or a mark
in the middle stands above those around it, `at_depth` says None and the whole model has to be run.

Left out: models whose layers differ (`alike`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..strategies.fake_memory import StorageTracker

DEPTHS = (4, 5, 6)
WHOLE_UP_TO = sum(DEPTHS)  # layers that are no more than these three runs have together
EDGE = 2  # layers at either end that are looked at one by one; those between lie between their neighbours
Place = tuple[str, str, int, int]  # what, seen from which end, how far, the how manieth time


def alike(config: Any) -> bool:
    """Whether every decoder layer of a transformers configuration is the same module with the same sizes."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["one"]
    mixed = getattr(config, "mlp_only_layers", None) or getattr(config, "first_k_dense_replace", 0)
    return len(set(kinds)) == 1 and not mixed and getattr(config, "decoder_sparse_step", 1) == 1


def cut(config: Any, layers: int) -> Any:
    """`config`, in place, with the first `layers` of its layers."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers
    if kinds:
        text.layer_types = list(kinds)[:layers]
    return config


@dataclass
class Timeline:
    """The most that was alive after each mark of one step. `watch` the layers, `close` when a phase has ended."""

    tracker: StorageTracker
    layers: int = 0
    peaks: dict[tuple[str, int, int], int] = field(default_factory=dict)
    _at: tuple[str, int, int] = ("begin", -1, 0)
    _times: Counter[tuple[str, int]] = field(default_factory=Counter)

    def watch(self, net: nn.Module, layers: int) -> None:
        stacks = [m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
        self.layers = layers
        for i, layer in enumerate(stacks[0]):
            layer.register_forward_pre_hook(partial(self._enters, i), with_kwargs=True)

    def _enters(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Also when a checkpointed layer is computed again."""
        self.mark("forward", layer)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(partial(self._left, layer))

    def _left(self, layer: int, gradient: Tensor) -> None:
        self.mark("backward", layer)

    def mark(self, what: str, layer: int = -1) -> None:
        self.close()
        self._at = (what, layer, self._times[what, layer])
        self._times[what, layer] += 1

    def close(self) -> None:
        self.peaks[self._at] = max(self.peaks.get(self._at, 0), self.tracker.peak_bytes)
        self.tracker.restart_peak()

    def places(self) -> dict[Place, int] | None:
        """Peaks by place; None where a layer in the middle holds more than the ones around it."""
        found: dict[Place, int] = {}
        between: list[tuple[str, int, int]] = []
        for (what, layer, time), peak in self.peaks.items():
            last = self.layers - 1 - layer
            if layer < EDGE:
                found[what, "first", layer, time] = peak
            elif last < EDGE:
                found[what, "last", last, time] = peak
            else:
                between.append((what, time, peak))
        for what, time, peak in between:
            around = [found.get((what, end, EDGE - 1, time), 0) for end in ("first", "last")]
            if peak > max(around):
                return None
        return found


def at_depth(steps: Sequence[Mapping[Place, int] | None], layers: int) -> dict[Place, int] | None:
    """The places of a step of `layers` layers from those at DEPTHS; None where one of them is not linear."""
    one, two, three = steps
    if one is None or two is None or three is None or not one.keys() == two.keys() == three.keys():
        return None
    if any(two[place] - one[place] != three[place] - two[place] for place in one):
        return None
    return {place: three[place] + (layers - DEPTHS[-1]) * (three[place] - two[place]) for place in three}
