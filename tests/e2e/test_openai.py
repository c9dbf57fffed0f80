"""The OpenAI Python SDK, unmodified, against both routes."""
import asyncio
import json
import socket
import subprocess
import time

import httpx
import jsonschema
import openai
import pytest

from conftest import complete


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)


def test_completion(client, model):
    result = client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, temperature=0,
                                       extra_body={"ignore_eos": True})
    assert result.object == "text_completion"
    assert result.choices[0].text
    assert result.choices[0].finish_reason == "length"
    assert result.usage.completion_tokens == 12
    assert result.usage.total_tokens == result.usage.prompt_tokens + 12
    details = result.usage.completion_tokens_details
    assert details.accepted_prediction_tokens >= 0 and details.rejected_prediction_tokens >= 0


def test_stream_equals_plain(client, model):
    fields = dict(model=model, prompt="Once upon a time", max_tokens=24, temperature=0.8, seed=7)
    plain = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == plain.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason


def test_async_streams_at_once(server, model):
    async def one(client, seed):
        text = ""
        async for chunk in await client.completions.create(model=model, prompt="The sea", max_tokens=16, seed=seed, stream=True):
            text += chunk.choices[0].text
        return text

    async def run(seeds):
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused") as client:
            return await asyncio.gather(*[one(client, seed) for seed in seeds])

    together = asyncio.run(run(range(12)))
    alone = [asyncio.run(run([seed]))[0] for seed in (0, 5, 11)]
    assert [together[0], together[5], together[11]] == alone   # company changes nothing


def test_chat(client, model, has_chat):
    if not has_chat:
        pytest.skip("the model has no chat template")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    result = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0, logprobs=True,
                                            top_logprobs=3)
    assert result.choices[0].message.role == "assistant"
    entries = result.choices[0].logprobs.content
    assert entries and all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in entries)
    assert entries[0].top_logprobs[0].token == entries[0].token   # greedy takes the likeliest
    chunks = list(client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == result.choices[0].message.content


def test_special_tokens_in_user_text_stay_text(server, has_chat):
    if not has_chat:
        pytest.skip("the model has no chat template")

    def count(content):
        body = {"messages": [{"role": "user", "content": content}]}
        return httpx.post(server.url + "/tokenize", json=body).json()["tokens"]

    plain = count("hello")
    specials = {token for token in plain if plain.count(token) >= 1}
    for spelled in ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>"):
        tokens = count("hello " + spelled)
        ids = httpx.post(server.url + "/tokenize", json={"prompt": spelled, "add_special_tokens": False}).json()["tokens"]
        if len(ids) == 1:   # it is a special token of this model
            assert tokens.count(ids[0]) == plain.count(ids[0]), (spelled, specials)


def test_lists_n_echo_best_of(server):
    answer = complete(server, prompt=["Once", "The sea"], n=2, temperature=1, seed=3).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    again = complete(server, prompt=["Once", "The sea"], n=2, temperature=1, seed=3).json()
    assert [c["text"] for c in answer["choices"]] == [c["text"] for c in again["choices"]]
    assert complete(server, prompt="Once", echo=True).json()["choices"][0]["text"].startswith("Once")
    best = complete(server, best_of=3, n=1, temperature=1, seed=1).json()
    assert len(best["choices"]) == 1 and best["usage"]["completion_tokens"] == 48


def test_token_ids_and_round_trip(server):
    text = "Once upon a time — naïve 🙂"
    tokens = httpx.post(server.url + "/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert httpx.post(server.url + "/detokenize", json={"tokens": tokens}).json()["prompt"] == text
    by_ids = complete(server, prompt=tokens).json()["choices"][0]["text"]
    assert by_ids == complete(server, prompt=[tokens]).json()["choices"][0]["text"]


def test_logprobs(server):
    choice = complete(server, logprobs=2, max_tokens=6).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 6
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"][0] == 0 and "".join(logprobs["tokens"]) == choice["text"]


def test_echo_with_logprobs_scores_the_prompt(server):
    choice = complete(server, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "Once upon a time"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])


VLLM_DEFAULTS = {"skip_special_tokens": True, "spaces_between_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0,
                 "return_token_ids": False, "return_tokens_as_token_ids": False, "min_p": 0.0, "top_k": -1, "min_tokens": 0,
                 "repetition_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False, "ignore_eos": False,
                 "priority": 0, "truncate_prompt_tokens": None, "allowed_token_ids": None, "bad_words": [], "prompt_logprobs": None,
                 "include_reasoning": True, "return_token_offsets": False, "return_mm_kwargs": True, "cache_salt": "x",
                 "routed_experts_prompt_start": 0, "structured_outputs": None, "vllm_xargs": None, "logprob_token_ids": None}


def test_clients_of_vllm_may_send_their_defaults(server, has_chat):
    """What changes nothing is accepted; another value is refused by name, never ignored."""
    routes = [("/v1/completions", {"prompt": "x", "suffix": "", "add_special_tokens": True})]
    if has_chat:
        routes.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True,
                                                "continue_final_message": False, "chat_template_kwargs": {},
                                                "add_special_tokens": False, "echo": False}))
    for route, body in routes:
        body = {**body, **VLLM_DEFAULTS, "max_tokens": 1}
        assert httpx.post(server.url + route, json=body, timeout=60).status_code == 200, route
        for name, other in (("use_beam_search", True), ("length_penalty", 0.5), ("add_special_tokens", "no"),
                            ("include_reasoning", False)):
            answer = httpx.post(server.url + route, json={**body, name: other})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    if has_chat:
        for name, other in (("continue_final_message", True), ("chat_template_kwargs", {"tokenize": True})):
            answer = httpx.post(server.url + route, json={**body, name: other})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert httpx.get(server.url + "/ping").status_code == 200


def test_special_tokens_are_left_out_of_the_text_unless_asked_for(server, stub, stubs):
    pb, _ = stubs
    special = None
    for spelling in ("<|endoftext|>", "</s>", "<s>", "<|im_end|>"):
        tokens = httpx.post(server.url + "/tokenize", json={"prompt": spelling, "add_special_tokens": False,
                                                            "return_token_strs": True}).json()
        assert len(tokens["token_strs"]) == tokens["count"]
        if tokens["token_strs"] == [spelling]:
            special = spelling, tokens["tokens"][0]
            break
    assert special, "the model has no special token that this test knows"
    spelling, token = special
    body = {"prompt": "x", "max_tokens": 2, "temperature": 0, "ignore_eos": True, "logit_bias": {str(token): 100}}
    for skip, text in ((None, ""), (True, ""), (False, spelling * 2)):
        fields = {} if skip is None else {"skip_special_tokens": skip}
        assert httpx.post(server.url + "/v1/completions", json={**body, **fields}).json()["choices"][0]["text"] == text
        request = pb.GenerateRequest(text="x", sampling=pb.SamplingParameters(temperature=0, logit_bias={token: 100}),
                                     stopping=pb.StoppingParameters(max_tokens=2, ignore_eos=True),
                                     response=pb.ResponseParameters(skip_special_tokens=skip))
        assert "".join(part.text for part in stub.Generate(request)) == text


def test_stop_strings(server):
    full = complete(server, max_tokens=48).json()["choices"][0]["text"]
    middle = full[len(full) // 2:len(full) // 2 + 5]
    expected = full[:full.index(middle)]
    for stream in (False, True):
        if stream:
            with httpx.stream("POST", server.url + "/v1/completions", timeout=60,
                              json={"prompt": "Once upon a time", "max_tokens": 48, "temperature": 0, "ignore_eos": True,
                                    "stop": [middle, "\u0000never"], "stream": True}) as response:
                chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
            text, reason = "".join(c["choices"][0]["text"] for c in chunks), chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = complete(server, max_tokens=48, stop=middle).json()["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
        assert (text, reason) == (expected, "stop")
    kept = complete(server, max_tokens=48, stop=middle, include_stop_str_in_output=True).json()["choices"][0]["text"]
    assert kept == expected + middle


@pytest.mark.parametrize("fields", [
    {"temperature": 0}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.7, "repetition_penalty": 1.2}, {"temperature": 1, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"temperature": 0.8, "typical_p": 0.9}, {"temperature": 0.8, "logit_bias": {"5": -100, "9": 3}, "logprobs": 1}])
def test_speculation_changes_nothing_but_speed(server, fields):
    texts = [complete(server, max_tokens=48, seed=11, speculation=mode, **fields).json()["choices"][0]["text"]
             for mode in ("off", "ngram", "auto")]
    assert texts[0] == texts[1] == texts[2]


def test_errors_through_the_sdk(client, model):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=model, prompt="x", temperature=9)
    assert error.value.param == "temperature" and "9" in str(error.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}],
                                       tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert error.value.param == "tools"


def test_sdk_timeout_frees_the_slot(server, model):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model=model, prompt="x", max_tokens=100000, extra_body={"ignore_eos": True})
    server.wait_idle()


def test_sdk_retries_after_an_overload(make_server):
    server = make_server("--max-requests", "1", "--max-queue-requests", "1")
    body = json.dumps({"prompt": "x", "max_tokens": 10000, "ignore_eos": True})
    busy, statuses = [], []

    def note(response):
        statuses.append((response.status_code, response.headers.get("Retry-After")))
        while busy:  # refused once: now there is room
            busy.pop().close()

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=20,
                           http_client=httpx.Client(event_hooks={"response": [note]}))
    # The second only when the first has the slot, or it would be the one that is refused.
    for metric in ("linspec_num_requests_running", "linspec_num_requests_waiting"):
        busy.append(socket.create_connection(("127.0.0.1", server.http_port), timeout=10))
        busy[-1].sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        while server.metric(metric) == 0:
            time.sleep(0.02)
    assert client.completions.create(model="", prompt="x", max_tokens=4).choices[0].text
    assert statuses[0][0] == 503 and int(statuses[0][1]) >= 1 and statuses[-1] == (200, None)


def test_async_errors_and_cancellation(server, model):
    async def run():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError) as error:
                await client.completions.create(model=model, prompt="x", top_p=5)
            assert error.value.param == "top_p"
            stream = await client.completions.create(model=model, prompt="x", max_tokens=100000, stream=True,
                                                     extra_body={"ignore_eos": True})
            async for _ in stream:
                break
            await stream.close()   # the client has had enough

    asyncio.run(run())
    server.wait_idle()


def test_curl(server, tmp_path):
    """With a body so long that curl asks first (Expect: 100-continue), and streamed."""
    (tmp_path / "body").write_text(json.dumps({"prompt": "a " * 3000, "max_tokens": 4, "stream": True, "user": "u" * 1100000}))
    command = ["curl", "-sSN", "--fail-with-body", server.url + "/v1/completions", "-H", "Content-Type: application/json",
               "--data-binary", f"@{tmp_path / 'body'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("data: {") and result.stdout.endswith("data: [DONE]\n\n")
    head = subprocess.run(["curl", "-sSI", server.url + "/v1/models"], capture_output=True, text=True, timeout=60, check=True)
    assert head.stdout.startswith("HTTP/1.1 200 OK")


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(server.url + "/openapi.json").json()


def test_openapi_routes_answer(server, document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            headers = {"Content-Type": "application/json"}
            response = httpx.request(method.upper(), server.url + path, headers=headers, content=b"{}" if method == "post" else None)
            assert response.status_code not in (405, 415, 500) and (response.status_code != 404 or "{id}" in path), (path, method)
            assert str(response.status_code) in operation["responses"] or "default" in operation["responses"], (path, method)
        wrong = "DELETE" if path != "/v1/completions" else "PUT"
        assert httpx.request(wrong, server.url + path).status_code == 405


def check(document, schema, instance):
    """Against a schema of the document; what the schema does not name, the server must not say."""
    jsonschema.validate(instance, {"$ref": f"#/components/schemas/{schema}", "components": document["components"]})


def test_openapi_describes_the_answers(server, document, has_chat):
    prompt = {"prompt": "x", "max_tokens": 3, "n": 2, "logprobs": 2, "echo": True, "return_token_ids": True}
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2,
            "return_token_ids": True}
    for path, schema, body in (("/v1/completions", "Completion", prompt), ("/v1/chat/completions", "ChatCompletion", chat)):
        if path == "/v1/chat/completions" and not has_chat:
            continue
        check(document, schema, httpx.post(server.url + path, json=body, timeout=60).json())
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        lines = httpx.post(server.url + path, json=streamed, timeout=60).text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert len(chunks) >= 3
        for chunk in chunks:
            check(document, schema + "Chunk", chunk)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
        assert counts == sorted(counts) and len(counts) >= len(chunks) - 2   # all but the chunks that open a chat
    answer = httpx.post(server.url + "/v1/responses", json={"input": "x", "max_output_tokens": 4}, timeout=60)
    if has_chat:
        check(document, "Response", answer.json())
    check(document, "Props", httpx.get(server.url + "/props").json())
    check(document, "ModelList", httpx.get(server.url + "/v1/models").json())
    check(document, "Tokens", httpx.post(server.url + "/tokenize", json={"prompt": "x"}).json())
    check(document, "Text", httpx.post(server.url + "/detokenize", json={"tokens": [5]}).json())
    check(document, "Error", httpx.post(server.url + "/v1/completions", json={"prompt": "x", "n": 0}).json())


@pytest.mark.parametrize("route, schema, base", [
    ("/v1/completions", "CompletionRequest", {"prompt": "x", "max_tokens": 1}),
    ("/v1/chat/completions", "ChatRequest", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
    ("/v1/responses", "ResponsesRequest", {"input": "x", "max_output_tokens": 1})])
def test_openapi_describes_the_requests(server, document, has_chat, route, schema, base):
    """Each documented field: its bounds are accepted, what lies beyond and every other type is not."""
    if "prompt" not in base and not has_chat:
        pytest.skip("the model has no chat template")

    def status(**fields):
        response = httpx.post(server.url + route, json={**base, **fields}, timeout=60)
        if response.status_code == 400:
            assert "unknown field" not in response.json()["error"]["message"], fields
        return response.status_code

    needs = {"top_logprobs": {"logprobs": True}, "best_of": {"n": 1}}
    for name, field in document["components"]["schemas"][schema]["properties"].items():
        extra, kind = needs.get(name, {}), field.get("type")
        if kind in ("integer", "number", "boolean"):
            assert status(**extra, **{name: "text"}) == 400 and status(**extra, **{name: [1]}) == 400, name
        if kind == "string":
            assert status(**{name: 5}) == 400, name
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound in field:
                assert status(**extra, **{name: field[bound] + beyond}) == 400, (name, bound)
                if name not in ("min_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of"):
                    assert status(**extra, **{name: field[bound]}) == 200, (name, bound)
        if "exclusiveMinimum" in field:
            assert status(**{name: field["exclusiveMinimum"]}) == 400, name
        for value in field.get("enum", []):
            assert status(**{name: value}) in (200, 400), name   # a drafter that is not loaded is a 400 too
        if "enum" in field:
            assert status(**{name: "none of them"}) == 400, name
    response = httpx.post(server.url + route, json={**base, "no_such_field": 1})
    assert response.status_code == 400 and response.json()["error"]["param"] == "no_such_field"


def test_prefix_cache(make_server, model):
    """The next turn and the copies of one prompt take up kept states, and say what a server without says."""
    question = [{"role": "user", "content": "Tell me of the old house by the sea, and of those who lived in it. " * 12}]
    answers = []
    for size in ("8", "0"):
        server = make_server("--max-requests", "8", "--prefix-cache", size)
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
        said, cached = [], []
        messages = list(question)
        for n in (1, 1, 3):
            result = client.chat.completions.create(model=model, messages=messages, max_tokens=24, n=n, seed=3,
                                                    extra_body={"ignore_eos": True})
            said.append([choice.message.content for choice in result.choices])
            cached.append(result.usage.prompt_tokens_details.cached_tokens)
            messages += [{"role": "assistant", "content": said[-1][0]}, {"role": "user", "content": "And then?"}]
        answers.append(said)
        if size == "8":
            assert cached[0] == 0 and cached[1] > 64 and cached[2] >= cached[1]
            assert server.metric("linspec_prefix_cache_hits_total") >= sum(cached)
            assert 1 <= server.metric("linspec_prefix_cache_entries") <= 8
        else:
            assert cached == [0, 0, 0]
        server.wait_idle()
        server.stop()
    assert answers[0] == answers[1]
