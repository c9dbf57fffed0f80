"""What clients of vLLM and llama.cpp send, over REST and gRPC: token ids, restricted vocabularies, cut prompts, /props."""
import json

import httpx
import pytest

from conftest import complete

PROMPT = "Once upon a time"


def tokenize(server, text, **fields):
    return httpx.post(server.url + "/tokenize", json={"prompt": text, **fields}).json()["tokens"]


def detokenize(server, ids):
    return httpx.post(server.url + "/detokenize", json={"tokens": ids}).json()["prompt"]


def post(server, route, **body):
    return httpx.post(server.url + route, json=body, timeout=60)


def chunks_of(server, route, **body):
    lines = post(server, route, stream=True, **body).text.split("\n\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_token_ids_of_completions(server):
    answer = complete(server, return_token_ids=True, n=2, temperature=1, seed=4).json()
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == tokenize(server, PROMPT)
        assert len(choice["token_ids"]) == 16
        assert detokenize(server, choice["prompt_token_ids"] + choice["token_ids"]) == PROMPT + choice["text"]
    fields = dict(prompt=PROMPT, max_tokens=16, temperature=1, seed=4, n=2, ignore_eos=True, return_token_ids=True)
    chunks = [chunk["choices"][0] for chunk in chunks_of(server, "/v1/completions", **fields)]
    for choice in answer["choices"]:
        mine = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert sum((chunk["token_ids"] for chunk in mine), []) == choice["token_ids"]
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in chunk for chunk in mine[1:])
    plain = complete(server).json()["choices"][0]
    assert "token_ids" not in plain and "prompt_token_ids" not in plain


def test_token_ids_of_a_chat(server, has_chat):
    if not has_chat:
        pytest.skip("the model has no chat template")
    body = dict(messages=[{"role": "user", "content": "Hello"}], max_tokens=12, temperature=0, return_token_ids=True)
    prompt = post(server, "/tokenize", messages=body["messages"]).json()["tokens"]
    answer = post(server, "/v1/chat/completions", **body).json()
    assert answer["prompt_token_ids"] == prompt
    choice = answer["choices"][0]
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
    chunks = chunks_of(server, "/v1/chat/completions", **body)
    assert chunks[0]["prompt_token_ids"] == prompt and not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    assert sum((chunk["choices"][0].get("token_ids", []) for chunk in chunks), []) == choice["token_ids"]


def test_what_ended_an_answer(server):
    text = complete(server, max_tokens=32).json()["choices"][0]["text"]
    middle = text[len(text) // 2:len(text) // 2 + 4]
    by_string = complete(server, max_tokens=32, stop=middle, return_token_ids=True).json()
    choice = by_string["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", middle)
    assert len(choice["token_ids"]) == by_string["usage"]["completion_tokens"]   # those of the stop string too
    ids = complete(server, max_tokens=32, return_token_ids=True).json()["choices"][0]["token_ids"]
    stop = ids[10]
    by_token = complete(server, max_tokens=32, stop_token_ids=[stop], return_token_ids=True).json()["choices"][0]
    assert by_token["stop_reason"] == stop and by_token["token_ids"] == ids[:ids.index(stop) + 1]
    assert by_token["text"] == detokenize(server, tokenize(server, PROMPT) + ids[:ids.index(stop)])[len(PROMPT):]
    assert complete(server).json()["choices"][0]["stop_reason"] is None


def test_tokens_as_ids(server):
    choice = complete(server, logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(key.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for key in top)


@pytest.mark.parametrize("mode", ["off", "ngram", "auto"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_restricted_vocabulary_under_speculation(server, mode, temperature):
    fields = dict(max_tokens=40, temperature=temperature, seed=3, return_token_ids=True)
    free = complete(server, speculation="off", **fields).json()["choices"][0]
    allowed = sorted(set(free["token_ids"][::2]))
    choice = complete(server, speculation=mode, allowed_token_ids=allowed, **fields).json()["choices"][0]
    assert set(choice["token_ids"]) <= set(allowed)
    assert choice["text"] == complete(server, speculation="off", allowed_token_ids=allowed, **fields).json()["choices"][0]["text"]
    words = [word for word in free["text"].split() if word.isalpha()][:3]
    banned = complete(server, speculation=mode, bad_words=words, **fields).json()["choices"][0]
    assert not set(words) & set(banned["text"].split()), (words, banned["text"])
    assert banned["text"] == complete(server, speculation="off", bad_words=words, **fields).json()["choices"][0]["text"]


def test_bad_word_of_several_tokens(server):
    fields = dict(max_tokens=40, return_token_ids=True)
    free = complete(server, **fields).json()["choices"][0]
    phrase = " ".join(free["text"].split()[2:5])
    assert len(tokenize(server, phrase, add_special_tokens=False)) > 2 and phrase in free["text"]
    banned = complete(server, bad_words=[phrase], **fields).json()["choices"][0]
    assert phrase not in banned["text"]
    first = free["text"].index(phrase.rsplit(" ", 1)[0])
    assert banned["text"][:first] == free["text"][:first]   # untouched up to the phrase


def test_a_vocabulary_with_nothing_left_is_the_clients_mistake(server):
    word = tokenize(server, " the", add_special_tokens=False)
    assert len(word) == 1
    response = complete(server, allowed_token_ids=word, bad_words=[" the"])
    assert response.status_code == 400 and "banned" in response.json()["error"]["message"]
    assert complete(server, allowed_token_ids=[10**8]).json()["error"]["param"].startswith("allowed_token_ids")


def test_prompts_are_cut(server):
    text = "one two three four five six seven eight nine ten"
    ids = tokenize(server, text)
    fields = dict(prompt=text, max_tokens=8, return_token_ids=True)
    for side, kept in (("left", ids[-5:]), ("right", ids[:5])):
        answer = complete(server, **fields, truncate_prompt_tokens=5, truncation_side=side).json()
        assert answer["choices"][0]["prompt_token_ids"] == kept and answer["usage"]["prompt_tokens"] == 5
        assert answer["choices"][0]["text"] == complete(server, prompt=kept, max_tokens=8).json()["choices"][0]["text"]
    echo = complete(server, **fields, truncate_prompt_tokens=5, echo=True).json()["choices"][0]
    assert echo["text"].startswith(detokenize(server, ids[-5:])) and echo["token_ids"][:5] == ids[-5:]
    whole = complete(server, **fields, truncate_prompt_tokens=-1).json()["choices"][0]
    assert whole["prompt_token_ids"] == ids
    bare = complete(server, **fields, add_special_tokens=False).json()["choices"][0]
    assert bare["prompt_token_ids"] == tokenize(server, text, add_special_tokens=False)


def test_request_id_of_the_body(server):
    assert complete(server, request_id="mine-1").json()["id"] == "cmpl-mine-1"
    both = httpx.post(server.url + "/v1/completions", headers={"X-Request-Id": "header"}, timeout=60,
                      json={"prompt": "x", "max_tokens": 1, "request_id": "body"})
    assert both.json()["id"] == "cmpl-header" and both.headers["X-Request-Id"] == "header"
    assert complete(server, request_id='"<bad>').json()["error"]["param"] == "request_id"


def test_cache_salt_keeps_prompts_apart(server):
    prompt = "It was a dark and stormy night, and nobody had thought of this prompt before. " * 12

    def cached(salt):
        usage = complete(server, prompt=prompt, max_tokens=2, cache_salt=salt).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert cached("a") == 0 and cached("a") > 100
    assert cached("b") == 0 and cached("b") > 100
    assert complete(server, cache_salt="x" * 1025).json()["error"]["param"] == "cache_salt"


REFUSED = {"prompt_logprobs": 1, "structured_outputs": {"regex": "a+"}, "guided_json": {}, "logits_processors": ["mine.py"],
           "vllm_xargs": {"a": 1}, "prompt_embeds": "AAAA", "kv_transfer_params": {"a": 1}, "logprob_token_ids": [1],
           "grammar": "root ::= x", "repetition_detection": {}, "return_mm_kwargs": False}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(server, name):
    error = complete(server, **{name: REFUSED[name]}).json()["error"]
    assert error["param"] == name and "not supported" in error["message"]


def test_grpc_says_the_same(server, stub, stubs):
    pb, _ = stubs
    text = "one two three four five six seven eight nine ten"
    ids = tokenize(server, text)
    free = complete(server, prompt=text, max_tokens=24, return_token_ids=True).json()["choices"][0]["token_ids"]
    stop = free[12]
    request = pb.GenerateRequest(
        text=text, sampling=pb.SamplingParameters(temperature=0, bad_words=["the"], allowed_token_ids=range(4000)),
        stopping=pb.StoppingParameters(max_tokens=24, ignore_eos=True, stop_token_ids=[stop]),
        response=pb.ResponseParameters(token_ids=True, prompt_token_ids=True, logprobs=0),
        prompt_parameters=pb.PromptParameters(truncate_tokens=6, truncate_end=True))
    responses = list(stub.Generate(request))
    rest = complete(server, prompt=text, max_tokens=24, return_token_ids=True, bad_words=["the"], logprobs=0, stop_token_ids=[stop],
                    allowed_token_ids=list(range(4000)), truncate_prompt_tokens=6, truncation_side="right").json()
    choice = rest["choices"][0]
    assert list(responses[0].prompt_token_ids) == choice["prompt_token_ids"] == ids[:6]
    assert all(not response.prompt_token_ids for response in responses[1:])
    assert [token for response in responses for token in response.token_ids] == choice["token_ids"]
    assert "".join(response.text for response in responses) == choice["text"]
    assert sum(len(response.logprobs) for response in responses) == len(choice["logprobs"]["tokens"])
    assert (responses[-1].stop_token_id if responses[-1].HasField("stop_token_id") else None) == choice["stop_reason"]
    assert responses[-1].usage.completion_tokens == rest["usage"]["completion_tokens"] == len(choice["token_ids"])


def test_props_of_llama_cpp(server, model, has_chat):
    props = httpx.get(server.url + "/props").json()
    assert props["default_generation_settings"]["n_ctx"] == httpx.get(server.url + "/v1/models").json()["data"][0]["max_model_len"]
    assert props["total_slots"] == 8 and props["model_alias"] == model
    assert bool(props["chat_template"]) == has_chat
    assert httpx.get(server.url + "/slots").status_code == 404
