"""Gateway and engine as they run: two processes, HTTP, the official client."""

import concurrent.futures
import math
import os
import signal
import threading
import time

import httpx
import openai
import pytest
import torch
from prism.contract import Metric
from prometheus_client.parser import text_string_to_metric_families

PROMPT = "The quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as c:
        yield c


def complete(server, **fields):
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
    return server.post("/v1/completions", body)


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_greedy_tokens_through_the_api_are_those_of_generate(server, artifact):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    vocab = reference.config.vocab_size
    for length in (1, 7, 130):  # 130 tokens are two chunks and more
        prompt = torch.randint(
            1, vocab, (1, length), generator=torch.Generator().manual_seed(length)
        )
        expected = reference.generate(prompt, max_new_tokens=24, do_sample=False)[0, length:]
        body = complete(
            server, prompt=prompt[0].tolist(), max_tokens=24, logprobs=0, model="m@100"
        ).json()
        got = body["choices"][0]["logprobs"]["tokens"]
        from prism_serving.gateway import text

        loaded = text.load(artifact)
        assert got == [loaded.token_text(t) for t in expected.tolist()]


def test_chat_whole_and_streamed_give_the_same_text(client):
    ask = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)
    stream = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prism == {"mean_level": 100.0, "lowest_level": 100}
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_alias_and_field_choose_the_level_and_the_header_says_it(server):
    for fields in ({"model": "m@50"}, {"prism": {"level": 50}}):
        response = complete(server, **fields)
        assert response.headers["x-prism-level"] == "50"
        assert response.json()["usage"]["prism"] == {"mean_level": 50.0, "lowest_level": 50}
    clash = complete(server, model="m@50", prism={"level": 75})
    assert clash.status_code == 400 and "prism.level" in clash.text


def test_a_lower_level_computes_fewer_sub_experts(server, wait):
    def selected(level):
        before = [server.metric(n) for n in (Metric.OWN_SLICES, Metric.CANDIDATE_SLICES)]
        assert complete(server, model=f"m@{level}", prompt=PROMPT * 3).status_code == 200
        wait(lambda: server.metric(Metric.CANDIDATE_SLICES) > before[1])
        time.sleep(0.7)  # one more report
        after = [server.metric(n) for n in (Metric.OWN_SLICES, Metric.CANDIDATE_SLICES)]
        return (after[0] - before[0]) / (after[1] - before[1])

    assert selected(100) == 1
    assert 0.1 < selected(25) < selected(50) < 0.75


def test_models_are_listed_with_their_aliases(client):
    names = [m.id for m in client.models.list()]
    assert names == ["m", "m@100", "m@75", "m@50", "m@25"]
    assert client.models.retrieve("m@50").id == "m@50"


def test_n_and_several_prompts_give_their_choices(client):
    out = client.completions.create(
        model="m", prompt=["one", "two"], n=2, max_tokens=3, seed=5, temperature=1.5
    )
    assert [c.index for c in out.choices] == [0, 1, 2, 3]
    assert out.choices[0].text != out.choices[1].text  # choices of one prompt differ
    assert out.usage.completion_tokens <= 12


def test_stop_strings_end_the_text_before_them(server):
    whole = text_of(complete(server, max_tokens=20))
    stop = whole[6:9]
    response = complete(server, max_tokens=20, stop=[stop])
    assert text_of(response) == whole[: whole.index(stop)]
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_logprobs_of_chat_name_token_and_alternatives(client):
    out = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=2,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    first = out.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 3
    assert first.logprob == first.top_logprobs[0].logprob <= 0


def test_text_offsets_of_completions_follow_the_prompt(client, artifact):
    from prism_serving.gateway import text

    prompt = "Nine — chars"
    ask = {"model": "m", "max_tokens": 12, "temperature": 0, "logprobs": 0}
    whole = client.completions.create(**ask, prompt=[prompt, "x"])
    assert [c.logprobs.text_offset[0] for c in whole.choices] == [len(prompt), 1]
    offsets = whole.choices[0].logprobs.text_offset
    stream = client.completions.create(**ask, prompt=prompt, stream=True)
    assert [o for chunk in stream for o in chunk.choices[0].logprobs.text_offset] == offsets
    by_ids = client.completions.create(**ask, prompt=text.load(artifact).encode(prompt))
    assert by_ids.choices[0].logprobs.text_offset == offsets


def test_seeded_sampling_repeats_under_concurrent_load(server):
    def ask(seed):
        return text_of(
            complete(server, seed=seed, temperature=1.0, top_p=0.95, max_tokens=24, ignore_eos=True)
        )

    alone = [ask(seed) for seed in range(3)]
    assert len(set(alone)) == 3
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, [0, 1, 2, 0, 1, 2]))
    assert together == alone * 2


BAD = [
    ({"prompt": "x", "model": "other"}, 404, "model", "does not exist"),
    ({"prompt": "x", "model": "m@7"}, 404, "model", "does not exist"),
    ({"model": "m"}, 400, "prompt", "missing field"),
    ({"model": "m", "prompt": "x", "banana": 1}, 400, "banana", "unknown field 'banana'"),
    ({"model": "m", "prompt": "x", "prism": {"speed": 1}}, 400, "prism.speed", "unknown field"),
    ({"model": "m", "prompt": "x", "prism": {"level": 5}}, 400, "prism.level", "10"),
    ({"model": "m", "prompt": "x", "temperature": -1}, 400, "temperature", "0"),
    ({"model": "m", "prompt": "x", "top_p": 0}, 400, "top_p", "0"),
    ({"model": "m", "prompt": "x", "max_tokens": 0}, 400, "max_tokens", "1"),
    ({"model": "m", "prompt": "x", "n": 99}, 400, "n", "16"),
    ({"model": "m", "prompt": "x", "presence_penalty": 1.5}, 400, "presence_penalty", "not supp"),
    ({"model": "m", "prompt": "x", "stop": [""]}, 400, "stop", "stop takes"),
    ({"model": "m", "prompt": ""}, 400, "prompt", "no tokens"),
    ({"model": "m", "prompt": [1, 99999]}, 400, "prompt", "Token ids"),
    ({"model": "m", "prompt": "x" * 300}, 400, "prompt", "maximum context length is 256"),
    ({"model": "m", "prompt": "x" * 200, "max_tokens": 99}, 400, "prompt", "asks for 99"),
    ({"model": "m", "prompt": "x", "top_k": 10**30}, 400, "top_k", "2147483647"),
    ({"model": "m", "prompt": "x", "min_tokens": 10**30}, 400, "min_tokens", "2147483647"),
    ([1, 2], 400, None, "JSON object"),
]


@pytest.mark.parametrize("body, status, param, message", BAD)
def test_bad_requests_get_openai_shaped_errors(server, body, status, param, message):
    response = server.post("/v1/completions", body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_official_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="nope", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_malformed_json_and_unknown_paths_are_explained(server):
    broken = httpx.post(f"{server.url}/v1/completions", content=b'{"model": ')
    assert broken.status_code == 400 and "not valid JSON" in broken.json()["error"]["message"]
    assert server.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    deep = httpx.post(f"{server.url}/v1/completions", content=b"[" * 9_000 + b"]" * 9_000)
    assert deep.status_code == 400 and "nested" in deep.json()["error"]["message"]
    half = b'{"model": "m", "prompt": "half a pair: \\ud83d"}'
    torn = httpx.post(f"{server.url}/v1/completions", content=half)
    assert torn.status_code == 400 and "lone surrogate" in torn.json()["error"]["message"]


def test_an_answer_can_be_sent_back_as_the_client_holds_it(client):
    question = {"role": "user", "content": "hi"}
    said = client.chat.completions.create(model="m", messages=[question], max_tokens=2)
    for answer in (said.choices[0].message, said.choices[0].message.model_dump()):
        messages = [question, answer, question]
        assert client.chat.completions.create(model="m", messages=messages, max_tokens=2).choices
    with pytest.raises(openai.BadRequestError, match="tool_calls"):
        calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]
        messages = [{"role": "assistant", "content": "x", "tool_calls": calls}]
        client.chat.completions.create(model="m", messages=messages)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversized_body_is_refused_while_it_is_read(server, chunked):
    def parts():
        for _ in range(30):
            yield b"x" * 1000

    content = parts() if chunked else b"x" * 30_000
    response = httpx.post(f"{server.url}/v1/completions", content=content)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"


def test_a_disconnect_frees_the_memory(server, wait):
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 200, "stream": True, "ignore_eos": True}
    aborted = server.metric(Metric.REQUEST_SUCCESS, finished_reason="abort")
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    wait(lambda: server.metric(Metric.REQUEST_SUCCESS, finished_reason="abort") == aborted + 1)
    wait(lambda: server.metric(Metric.KV_USAGE) == 0 and server.metric(Metric.RUNNING) == 0)


def test_a_full_queue_sheds_with_retry_after_and_counts_a_miss(server, wait):
    shed = server.metric(Metric.SHED, reason="queue_full")
    misses = server.metric(Metric.SLO_TOTAL, objective="ttft") - server.metric(
        Metric.SLO_GOOD, objective="ttft"
    )
    together = threading.Barrier(40)

    def ask(_: int):
        together.wait()
        return complete(server, prompt="x" * 200, max_tokens=50, ignore_eos=True)

    answers = []
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        for _ in range(5):  # on a busy machine the first burst may arrive too slowly to queue
            answers += pool.map(ask, range(40))
            if any(a.status_code == 429 for a in answers):
                break
    refused = [a for a in answers if a.status_code == 429]
    assert refused and {a.status_code for a in answers} == {200, 429}
    assert int(refused[0].headers["retry-after"]) >= 1
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert server.metric(Metric.SHED, reason="queue_full") == shed + len(refused)
    total = server.metric(Metric.SLO_TOTAL, objective="ttft")
    good = server.metric(Metric.SLO_GOOD, objective="ttft")
    assert total - good >= misses + len(refused)


def test_slo_events_are_one_per_request_and_one_per_gap(server):
    def counts():
        return [server.metric(Metric.SLO_TOTAL, objective=o) for o in ("ttft", "itl")]

    before = counts()
    assert complete(server, max_tokens=9, ignore_eos=True).status_code == 200
    assert complete(server, model="other").status_code == 404  # not an event
    after = counts()
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 8]


def test_every_series_of_the_contract_is_there_and_finite(server):
    page = server.get("/metrics").text
    samples = [s for f in text_string_to_metric_families(page) for s in f.samples]
    names = {s.name for s in samples}
    for key, name in vars(Metric).items():
        if key.startswith(("_", "LABEL_", "REFACTOR")):
            continue  # not a series, or the Job's
        assert name in names or f"{name}_bucket" in names, name
    assert all(math.isfinite(s.value) for s in samples)
    assert all(s.labels[Metric.LABEL_PRISM_MODEL] == "local/m" for s in samples)
    assert all(s.labels["model_name"] == "m" and s.labels["engine"] == "0" for s in samples)
    buckets = {s.labels["le"] for s in samples if s.name == f"{Metric.TTFT}_bucket"}
    assert {"0.001", "2560.0", "5.0", "4.5"} <= buckets  # vLLM's, and finer at the target


def test_both_ports_answer_unknown_ways_in_the_same_shape(server):
    admin, _ = server.admin()
    for base, path in ((server.url, "/v1/completions"), (admin, "/admin/level")):
        for method, where, status in (("DELETE", path, 405), ("GET", f"{path}/none", 404)):
            answer = httpx.request(method, base + where)
            assert answer.status_code == status
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert f"{method} {where}" in error["message"]
            assert ("allow" in answer.headers) == (status == 405)


def test_admin_needs_the_token_and_the_higher_seq_wins(server, wait):
    url, token = server.admin()
    auth = {"authorization": f"Bearer {token}"}
    level = {"seq": 10, "floor": 25, "ceiling": 50}
    for bad in ({}, {"authorization": "Bearer wrong"}, {"authorization": token}):
        assert httpx.put(f"{url}/admin/level", json=level, headers=bad).status_code == 401
        assert httpx.get(f"{url}/admin/profile", headers=bad).status_code == 401
    put = httpx.put(f"{url}/admin/level", json=level, headers=auth)
    assert (put.status_code, put.json()) == (200, level)
    assert httpx.put(f"{url}/admin/level", json=level, headers=auth).status_code == 200
    older = httpx.put(f"{url}/admin/level", json={**level, "seq": 9}, headers=auth)
    assert (older.status_code, older.json()) == (409, level)
    bad = httpx.put(
        f"{url}/admin/level", json={"seq": 11, "floor": 90, "ceiling": 20}, headers=auth
    )
    assert bad.status_code == 400 and "above ceiling" in bad.text
    wait(lambda: server.metric(Metric.LEVEL_CEILING) == 0.5)
    assert complete(server).headers["x-prism-level"] == "50"
    profile = httpx.get(f"{url}/admin/profile", headers=auth).json()
    assert profile["ready"] and profile["seq"] == 10
    assert [p["level"] for p in profile["levels"]] == [100, 75, 50, 25]
    assert all(p["prefill_seconds_per_token"] > 0 for p in profile["levels"])
    back = {"seq": 11, "floor": 25, "ceiling": 100}
    assert httpx.put(f"{url}/admin/level", json=back, headers=auth).status_code == 200
    wait(lambda: server.metric(Metric.LEVEL_CEILING) == 1)


def test_engine_killed_midstream_ends_the_request_and_a_new_one_serves(server, wait):
    url, token = server.admin()
    bounds = httpx.get(f"{url}/admin/level", headers={"authorization": f"Bearer {token}"}).json()
    expected = text_of(complete(server))
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.engine_pid(), signal.SIGKILL)
        rest = [line for line in lines if line]
    assert "engine went away" in rest[-1] and '"error"' in rest[-1]
    assert "[DONE]" not in rest[-1]
    assert server.get("/readyz").status_code == 200  # in the grace period
    away = complete(server)
    assert away.status_code == 503 and int(away.headers["retry-after"]) >= 1
    assert away.json()["error"]["code"] == "engine_unavailable"
    server.wait_ready()
    wait(lambda: server.metric(Metric.LEVEL_SEQ) == bounds["seq"])  # re-sent, not the file's
    assert text_of(complete(server)) == expected


def test_drain_finishes_what_runs_and_refuses_the_rest(start_server, artifact, wait):
    server = start_server(artifact, "--drain-seconds", "20", "--level", "75")
    server.wait_ready()
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        assert response.headers["x-prism-level"] == "75"
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        refused = complete(server)
        while refused.status_code == 200:
            refused = complete(server)
        rest = [line for line in lines if line]
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert rest[-1] == "data: [DONE]"
    assert server.process.wait(30) == 0
