"""Control objects and files: what is refused, and which bounds win."""

import json
import os

import pytest
from prism_serving import protocol
from prism_serving.control import Bounds, ControlError, Slo, parse_bounds, parse_slo, wins
from prism_serving.gateway.admin import is_allowed
from prism_serving.gateway.client import EngineClient
from prism_serving.gateway.metrics import Metrics
from prism_serving.gateway.watch import ControlWatch


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "expected an object"),
        ({"seq": 1, "floor": 50}, "ceiling must be an integer"),
        ({"seq": True, "floor": 50, "ceiling": 60}, "seq must be an integer"),
        ({"seq": 1, "floor": 5, "ceiling": 101}, "floor must be between 10 and 100, got 5; ceil"),
        ({"seq": 1, "floor": 60, "ceiling": 50}, "floor 60 is above ceiling 50"),
        ({"seq": -1, "floor": 50, "ceiling": 60}, "seq must be >= 0"),
        ({"seq": 1, "floor": 50, "ceiling": 60, "x": 1}, "unknown field 'x'"),
    ],
)
def test_bad_bounds_are_refused_with_the_reason(data, message):
    with pytest.raises(ControlError, match=message):
        parse_bounds(data)


@pytest.mark.parametrize(
    "data", [{"ttft_ms": 0}, {"ttft_ms": 1.5}, {"itl": 5}, 3, {"lowest_level": 9}]
)
def test_bad_targets_are_refused(data):
    with pytest.raises(ControlError):
        parse_slo(data)


def test_only_a_higher_seq_wins():
    assert wins(Bounds(2, 50, 60), Bounds(1, 50, 50))
    assert not wins(Bounds(1, 50, 60), Bounds(1, 50, 50))


def test_the_watch_follows_a_replaced_mount_and_ignores_a_broken_file(tmp_path):
    """As the kubelet does it: a new directory, then the ..data link is swapped."""

    def publish(name, level, slo):
        (tmp_path / name).mkdir()
        (tmp_path / name / "level.json").write_text(level)
        (tmp_path / name / "slo.json").write_text(json.dumps(slo))
        os.symlink(name, tmp_path / "..tmp")
        os.replace(tmp_path / "..tmp", tmp_path / "..data")

    for file in ("level.json", "slo.json"):
        os.symlink(f"..data/{file}", tmp_path / file)
    client = EngineClient(tmp_path / "socket", Metrics("m", "ns/m", Slo()))
    watch = ControlWatch(tmp_path, client)
    watch.check()
    assert client.bounds == Bounds()
    publish("..1", json.dumps({"seq": 5, "floor": 30, "ceiling": 80}), {"ttft_ms": 300})
    watch.check()
    assert (client.bounds, client.slo) == (Bounds(5, 30, 80), Slo(300, None))
    publish("..2", "{broken", {"ttft_ms": 300})
    watch.check()
    assert client.bounds == Bounds(5, 30, 80)
    publish("..3", json.dumps({"seq": 4, "floor": 10, "ceiling": 20}), {"itl_ms": 50})
    watch.check()
    assert (client.bounds, client.slo) == (Bounds(5, 30, 80), Slo(None, 50))


def test_tokens_are_checked_and_an_empty_digest_lets_nobody_in():
    digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # "secret"
    assert is_allowed("Bearer secret", digest)
    assert is_allowed("bearer secret", digest.upper())
    for header in (None, "", "secret", "Basic secret", "Bearer ", "Bearer Secret"):
        assert not is_allowed(header, digest)
    assert not is_allowed("Bearer ", "")


def test_peers_of_another_version_are_told_so():
    with pytest.raises(protocol.ProtocolError, match="protocol 99, this side 1"):
        protocol.require_same_version(99, "the engine")
    for garbage in (b"", b"\xc1", b"\x93\xa5Hello"):
        with pytest.raises(protocol.ProtocolError):
            protocol.decode_to_engine(garbage)


def test_messages_survive_the_wire():
    submit = protocol.Submit(
        request="r",
        prompt=[1, 2],
        max_tokens=3,
        received_s=1.5,
        sampling=protocol.Sampling(seed=-(2**63), logprobs=2),
        level=50,
    )
    assert protocol.decode_to_engine(protocol.encode(submit)) == submit
    deltas = protocol.Deltas(
        items=[
            protocol.Delta(
                request="r",
                tokens=[7],
                levels=[50],
                finish="stop",
                logprobs=[protocol.TokenLogprobs(chosen=-0.5, top=[(7, -0.5)])],
            )
        ]
    )
    assert protocol.decode_to_gateway(protocol.encode(deltas)) == deltas
