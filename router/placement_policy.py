"""Where a request goes: the interface of placement policies, and their registry.

A policy is deterministic and pure over plain data: what the handles say of their workers. The same object
places the requests of a gateway and those of the planner's simulator. A new one is one file plus one line in
config.POLICIES; its module is imported when it is chosen.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

from .config import POLICIES, RouterConfig
from .forecast import Predictor
from .placement import Demand, Placement
from .prefix_index import PrefixIndex
from .worker_handle import WorkerHandle


class PlacementPolicy(ABC):
    """Chooses workers. The prediction that comes with a choice is the same whoever chose."""

    def __init__(self, prefixes: PrefixIndex, config: RouterConfig) -> None:
        self._predictor = Predictor(prefixes, config.expected_output_tokens)

    @abstractmethod
    def place(
        self, demand: Demand, workers: Sequence[WorkerHandle], avoid: Collection[str] = ()
    ) -> Placement | None:
        """A placement on the ready `workers`: a prefill and a decode worker of one layout, or a decode or
        colocated worker alone. Those named in `avoid` only where nobody else has their part; equals in the
        order of `workers`. None: nothing is possible now."""

    def observe_completion(self, num_tokens: int) -> None:
        """A request finished with so many tokens."""
        self._predictor.observe_completion(num_tokens)

    def observe_handoff(self, seconds: float) -> None:
        """A hand-off took so long, from token 0 to verified."""
        self._predictor.observe_handoff(seconds)


def make_policy(config: RouterConfig, prefixes: PrefixIndex) -> PlacementPolicy:
    """The one that the configuration names."""
    module, _, name = POLICIES[config.policy].partition(":")
    policy: Callable[[PrefixIndex, RouterConfig], PlacementPolicy] = getattr(
        importlib.import_module(module), name
    )
    return policy(prefixes, config)


def by_part(
    workers: Sequence[WorkerHandle], avoid: Collection[str]
) -> tuple[list[WorkerHandle], list[WorkerHandle]]:
    """Prefill workers, and those that decode (decode and colocated ones); each without those to avoid, unless
    that leaves none."""
    prefills: list[WorkerHandle] = []
    decodes: list[WorkerHandle] = []
    for worker in workers:
        (prefills if worker.role == "prefill" else decodes).append(worker)
    if avoid:
        prefills, decodes = _prefer(prefills, avoid), _prefer(decodes, avoid)
    return prefills, decodes


def with_partner(prefills: Sequence[WorkerHandle], decodes: Sequence[WorkerHandle]) -> list[WorkerHandle]:
    """The prefill workers that can hand over to one of `decodes`."""
    layouts = {worker.layout_hash for worker in decodes if worker.role == "decode"}
    return [worker for worker in prefills if worker.layout_hash in layouts]


def partners(prefill: WorkerHandle, decodes: Sequence[WorkerHandle]) -> list[WorkerHandle]:
    """Those of `decodes` that the prefill worker can hand over to."""
    layout = prefill.layout_hash
    return [worker for worker in decodes if worker.role == "decode" and worker.layout_hash == layout]


def _prefer(workers: list[WorkerHandle], avoid: Collection[str]) -> list[WorkerHandle]:
    return [worker for worker in workers if worker.worker_id not in avoid] or workers
