"""The engine in this process: real model, real kernels, no sockets."""

import time

import pytest
import torch
from prism.kernels import choose
from prism_serving import protocol
from prism_serving.control import Bounds, Slo
from prism_serving.engine import loading
from prism_serving.engine.attention import UnsupportedAttention
from prism_serving.engine.costs import Curve
from prism_serving.engine.measure import Measuring, measure
from prism_serving.engine.options import parse
from prism_serving.engine.runner import Runner
from prism_serving.engine.scheduler import StepPlan
from prism_serving.engine.start import build
from prism_serving.engine.worker import Drain, NewSession
from prism_serving.protocol import Sampling
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM


def options(path, *flags):
    base = ["--artifact", str(path), "--dtype", "float32", "--threads", "1", "--device", "cpu"]
    small = ["--measure-seconds", "0.2", "--kv-tokens", "1024", "--batch-tokens", "48"]
    return parse([*base, *small, *flags])


@pytest.fixture
def engine(artifact):
    sent = []
    worker, state = build(options(artifact), Bounds(1, 25, 100), Slo(), sent.append)
    assert state.phase == "ready"
    return worker, sent


def submit(worker, name, prompt, new, **fields):
    sampling = Sampling(**{"temperature": 0.0, **fields.pop("sampling", {})})
    worker.inbox.put(
        protocol.Submit(
            request=name,
            prompt=prompt,
            max_tokens=new,
            sampling=sampling,
            received_s=time.monotonic(),
            **fields,
        )
    )


def drain(worker, sent):
    """Run to the end; tokens and last delta per request."""
    worker.inbox.put(Drain(time.monotonic() + 60))
    worker.run()
    tokens, last = {}, {}
    for delta in (d for m in sent if isinstance(m, protocol.Deltas) for d in m.items):
        tokens.setdefault(delta.request, []).extend(delta.tokens)
        last[delta.request] = delta
    return tokens, last


def test_a_mixed_batch_gives_each_request_what_generate_gives_it_alone(engine, artifact):
    worker, sent = engine
    reference = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(1, reference.config.vocab_size, (1, n), generator=draw)
        for n in (1, 5, 47, 48, 49, 130)
    ]
    for i, prompt in enumerate(prompts):
        submit(worker, str(i), prompt[0].tolist(), 12, sampling={"ignore_eos": True})
    tokens, last = drain(worker, sent)
    for i, prompt in enumerate(prompts):
        expected = reference.generate(
            prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=-1
        )
        assert tokens[str(i)] == expected[0, prompt.shape[1] :].tolist()
        assert last[str(i)].finish == "length"
    assert worker.scheduler.pool.used == 0


def test_levels_of_neighbours_do_not_mix(engine, artifact):
    """Mixed levels in one batch give the tokens of each level alone."""
    worker, sent = engine
    prompt = list(range(1, 60))
    for level in (100, 50, 25):
        submit(worker, f"mixed{level}", prompt, 10, level=level)
    mixed, _ = drain(worker, sent)
    for level in (100, 50, 25):
        again, sent_alone = build(options(artifact), Bounds(1, 25, 100), Slo(), (out := []).append)
        submit(again, "alone", prompt, 10, level=level)
        alone, _ = drain(again, out)
        assert mixed[f"mixed{level}"] == alone["alone"], level
        assert sent_alone.phase == "ready"


def test_a_new_gateway_cancels_what_the_old_one_asked(engine):
    worker, sent = engine
    submit(worker, "old", [1, 2, 3], 50)
    worker.inbox.put(NewSession())
    submit(worker, "new", [1, 2, 3], 2, sampling={"ignore_eos": True})
    tokens, _ = drain(worker, sent)
    assert list(tokens) == ["new"]


def test_a_failing_step_answers_its_requests_and_the_engine_goes_on(engine, monkeypatch):
    worker, sent = engine
    real, calls = worker.runner.logits, []

    def fails_once(plan):
        calls.append(plan)
        if len(calls) == 1:
            raise RuntimeError("out of luck")
        return real(plan)

    monkeypatch.setattr(worker.runner, "logits", fails_once, raising=True)
    submit(worker, "unlucky", [1, 2, 3], 4)
    worker._take_commands()
    from prism_serving.engine.stats import StatsWindow

    worker._step(StatsWindow(0.0))
    submit(worker, "lucky", [1, 2, 3], 4, sampling={"ignore_eos": True})
    tokens, last = drain(worker, sent)
    assert last["unlucky"].finish == "error" and "out of luck" in last["unlucky"].error
    assert len(tokens["lucky"]) == 4
    assert worker.scheduler.pool.used == 0


def test_what_cannot_fit_is_answered_not_dropped(engine):
    worker, sent = engine
    submit(worker, "huge", [1] * 1000, 100)
    _, last = drain(worker, sent)
    assert last["huge"].finish == "error" and "does not fit" in last["huge"].error


def test_drain_cuts_off_at_its_deadline(engine):
    worker, sent = engine
    submit(worker, "endless", [1], 200, sampling={"ignore_eos": True})
    worker.inbox.put(Drain(time.monotonic()))
    worker.run()
    last = [d for m in sent if isinstance(m, protocol.Deltas) for d in m.items][-1]
    assert last.finish == "error" and "shutting down" in last.error


def test_stats_are_increments_and_count_the_levels(engine):
    worker, sent = engine
    submit(worker, "a", [1] * 20, 5, level=50, sampling={"ignore_eos": True})
    drain(worker, sent)
    stats = [m for m in sent if isinstance(m, protocol.Stats)]
    tokens = {p: sum(s.level_tokens.get(p, 0) for s in stats) for p in ("prefill", "decode")}
    weighted = sum(sum(s.level_weighted.values()) for s in stats)
    assert tokens == {"prefill": 20, "decode": 4}
    assert weighted == pytest.approx(24 * 0.5)
    assert 0 < sum(s.own for s in stats) < sum(s.candidates for s in stats)
    assert len(stats[-1].profile) == 4


def test_a_level_of_25_makes_prompt_steps_faster(heavy_artifact):
    """The work falls with the level, in sub-experts and in seconds."""
    loaded = loading.load(heavy_artifact, "float32", "cpu")
    chosen = choose(loaded.device, torch.float32, 256, 128)
    if type(chosen).__name__ == "ReferenceKernel":
        pytest.skip("no C++ compiler: the torch reference does not get faster")
    torch.set_num_threads(1)
    runner = Runner(loaded.model, loading.kv_buffers(loaded, 512), loaded.device)
    m = Measuring(runner.logits, loaded.vocab, 512, 512, 512, 1.0)

    def work(level):
        plan = StepPlan((m._chunk(0, 0, 256, level),))
        runner.logits(plan)
        runner.own = runner.candidates = 0
        best = float("inf")
        for _ in range(5):
            began = time.process_time()
            runner.logits(plan)
            best = min(best, time.process_time() - began)
        return best, runner.own / runner.candidates

    seconds, shares = zip(*(work(level) for level in (100, 50, 25)), strict=True)
    assert shares[0] == 1 and shares[1] < 0.7 and shares[2] < 0.45
    assert seconds[2] < 0.65 * seconds[0], seconds
    assert seconds[1] < 0.9 * seconds[0], seconds


def test_measuring_gives_a_curve_per_level_and_respects_small_sizes(artifact):
    loaded = loading.load(artifact, "float32", "cpu")
    runner = Runner(loaded.model, loading.kv_buffers(loaded, 100), loaded.device)
    costs = measure(Measuring(runner.logits, loaded.vocab, 100, 256, 64, 0.2))
    assert set(costs.curves) == {100, 75, 50, 25}
    for curve in costs.curves.values():
        assert isinstance(curve, Curve) and max(curve.rows) <= 64
        assert all(s > 0 for s in curve.seconds)


def test_sliding_window_attention_is_refused_by_name(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        sliding_window=16,
        max_position_embeddings=64,
    )
    model = MixtralForCausalLM(config).eval()
    from prism_serving.engine import attention
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, attention.attention)
    model.set_attn_implementation(attention.NAME)
    with pytest.raises(UnsupportedAttention, match="sliding-window attention"):
        loading._probe(model, config, torch.device("cpu"))
