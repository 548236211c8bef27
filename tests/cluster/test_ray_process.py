"""What Ray says of an actor that does not start becomes an error with a sentence."""

from __future__ import annotations

import pytest
from diphase.cluster.config import PlacementConfig, load
from diphase.cluster.ray_process import _NOT_SHOWN, NodeAgents, RayProcess, no_room
from diphase.cluster.roles import Assignment, StartFailed
from diphase.cluster.slot import ProcessGone
from diphase.proto.clock import system_rng
from diphase.proto.errors import InternalError
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    RayTaskError,
    RuntimeEnvSetupError,
)


@pytest.mark.parametrize(
    "name",
    [
        "node:10.0.0.1",
        "CPU_group_0_70dc8e2f2a9db469efa7b7654f6f01000000",
        "bundle_group_e6a20d27e0d00e88fb92f7dbea9a01000000",
    ],
)
def test_what_ray_makes_up_itself_is_not_among_what_a_cluster_has(name: str) -> None:
    assert _NOT_SHOWN.search(name)
    assert not any(
        _NOT_SHOWN.search(real) for real in ("CPU", "GPU", "memory", "accelerator_group_a", "left")
    )


@pytest.mark.parametrize(
    ("placement", "keys"),
    [
        (PlacementConfig(), "less in pools.decode.cpus, or"),
        (PlacementConfig(cpus=0.0, gpus=1.0), "less in pools.decode.gpus, or"),
        (
            PlacementConfig(resources={"left": 1.0, "up": 1.0}),
            "less in pools.decode.cpus or pools.decode.resources, or",
        ),
    ],
)
def test_who_finds_no_room_is_told_which_keys_take_it(placement: PlacementConfig, keys: str) -> None:
    message = no_room("decode", placement, 1, 30.0, {"CPU": 2.0}).message
    assert message.startswith("pools.decode: no room for 1 workers of {'")
    assert "{'CPU': 2.0} in all" in message
    assert keys in message


class FakeActor:
    """The method `start` of an actor; each call has the next outcome."""

    def __init__(self, *outcomes: StartFailed | Exception) -> None:
        self._outcomes = list(outcomes)
        self.start = self

    async def remote(self, assignment: Assignment) -> StartFailed:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def start(*outcomes: StartFailed | Exception) -> object:
    process = RayProcess(FakeActor(*outcomes), NodeAgents("diphase-test"))
    config = load(None, (), system_rng())
    return await process.start(Assignment(worker_id="decode-0", role="decode", config=config, store_url=""))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ActorUnschedulableError("the bundle is gone"), "the bundle is gone"),
        (RuntimeEnvSetupError("no such interpreter"), "no such interpreter"),
        (RayTaskError("start", "Traceback\nValueError: boom", ValueError("boom")), "ValueError: boom"),
    ],
)
async def test_a_start_that_ray_refuses_is_an_error_with_its_reason(error: Exception, sentence: str) -> None:
    with pytest.raises(InternalError) as caught:
        await start(error)
    assert caught.value.message.startswith("Ray did not start decode-0: ")
    assert caught.value.message.endswith(sentence)
    assert "\n" not in caught.value.message


async def test_an_actor_that_ray_is_restarting_is_waited_for() -> None:
    answer = StartFailed(code="internal", message="later")
    assert await start(ActorUnavailableError("restarting", None), answer) is answer


async def test_an_actor_that_ray_gave_up_is_gone() -> None:
    with pytest.raises(ProcessGone, match="Ray gave decode-0 up"):
        await start(ActorDiedError())
