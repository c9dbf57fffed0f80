"""gRPC with stubs generated from the proto alone."""
import threading
import time

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conftest import complete


def details_of(error, kind):
    """google.rpc details of a failed call."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    for any_message in status.details:
        message = kind()
        if any_message.Unpack(message):
            return message
    return None


def request_of(pb, **fields):
    base = dict(text="Once upon a time", sampling=pb.SamplingParameters(temperature=0),
                stopping=pb.StoppingParameters(max_tokens=16, ignore_eos=True))
    base.update(fields)
    return pb.GenerateRequest(**base)


def test_generate_equals_rest(server, stub, stubs):
    pb = stubs[0]
    responses = list(stub.Generate(request_of(pb, response=pb.ResponseParameters(token_ids=True, logprobs=1))))
    assert "".join(r.text for r in responses) == complete(server).json()["choices"][0]["text"]
    last = responses[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH and last.usage.completion_tokens == 16
    assert sum(len(r.token_ids) for r in responses) == sum(len(r.logprobs) for r in responses) == 16
    assert all(r.finish_reason == pb.FINISH_REASON_UNSPECIFIED for r in responses[:-1])


def test_token_ids_only(stub, stubs):
    pb = stubs[0]
    ids = list(stub.Tokenize(pb.TokenizeRequest(text="Once upon a time")).token_ids)
    request = request_of(pb, response=pb.ResponseParameters(skip_text=True))
    request.token_ids.ids.extend(ids)
    responses = list(stub.Generate(request))
    produced = [token for r in responses for token in r.token_ids]
    assert len(produced) == 16 and not any(r.text for r in responses)
    text = stub.Detokenize(pb.DetokenizeRequest(token_ids=produced)).text
    assert text.strip()


def test_model_stats_health_reflection(server, stub, stubs):
    pb = stubs[0]
    answer = stub.GetModel(pb.GetModelRequest())
    assert answer.vocab_size > 0 and answer.state_bytes_per_request > 0 and answer.max_requests == 8
    assert answer.state_dtype == "F32"
    stats = stub.GetStats(pb.GetStatsRequest())
    assert stats.slots_total == 8
    channel = grpc.insecure_channel(server.grpc_address)
    for service in ("", "linspec.v1.LinSpec"):
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert "linspec.v1.LinSpec" in [s.name for s in next(listing).list_services_response.service]


@pytest.mark.parametrize("change, field", [
    (dict(temperature=float("nan")), "temperature"), (dict(temperature=-1), "temperature"), (dict(top_p=0), "top_p"),
    (dict(top_p=float("inf")), "top_p"), (dict(min_p=2), "min_p"), (dict(repetition_penalty=0), "repetition_penalty"),
    (dict(frequency_penalty=1e30), "frequency_penalty"), (dict(top_k=-5), "top_k"),
    (dict(logit_bias={-1: 1.0}), "logit_bias"), (dict(logit_bias={2**31 - 1: 1.0}), "logit_bias"),
    (dict(logit_bias={1: float("nan")}), "logit_bias"), (dict(max_tokens=0), "max_tokens"),
    (dict(max_tokens=-1), "max_tokens"), (dict(max_tokens=2**31 - 1), "max_tokens"), (dict(min_tokens=99), "min_tokens"),
    (dict(stop=[""]), "stop"), (dict(stop=["x"] * 100000), "stop"), (dict(stop=["x" * 1000000]), "stop"),
    (dict(stop_token_ids=[-1]), "stop_token_ids"), (dict(logprobs=21), "logprobs"), (dict(speculation=99), "speculation"),
    (dict(text=""), "prompt"), (dict(ids=[-1]), "prompt"), (dict(ids=[2**31 - 1]), "prompt"), (dict(prompt=None), "prompt"),
    (dict(chat_role="wizard"), "role"), (dict(request_id="x" * 200), "request_id")])
def test_bad_fields_name_themselves(server, stub, stubs, change, field):
    pb = stubs[0]
    request = request_of(pb)
    for name, value in change.items():
        if name == "text":
            request.text = value
        elif name == "ids":
            request.token_ids.ids.extend(value)
        elif name == "prompt":
            request.ClearField("text")
        elif name == "chat_role":
            request.chat.messages.add(role=value, content="x")
        elif name in ("speculation", "request_id"):
            setattr(request, name, value)
        else:
            part = next(p for p in (request.sampling, request.stopping, request.response) if name in p.DESCRIPTOR.fields_by_name)
            if name == "logit_bias":
                part.logit_bias.update(value)
            elif isinstance(value, list):
                getattr(part, name).extend(value)
            else:
                setattr(part, name, value)
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Generate(request))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in error.value.details()
    server.wait_idle()


def test_dropping_the_stream_frees_the_slot(server, stub, stubs):
    pb = stubs[0]
    call = stub.Generate(request_of(pb, stopping=pb.StoppingParameters(max_tokens=100000, ignore_eos=True)))
    next(call)
    assert stub.GetStats(pb.GetStatsRequest()).slots_free == 7
    call.cancel()
    server.wait_idle()


def test_abort(server, stub, stubs):
    pb = stubs[0]
    stopping = pb.StoppingParameters(max_tokens=100000, ignore_eos=True)
    call = stub.Generate(request_of(pb, request_id="mine", stopping=stopping))
    next(call)
    with pytest.raises(grpc.RpcError) as error:   # the name is taken
        next(stub.Generate(request_of(pb, request_id="mine")))
    assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS
    stub.Abort(pb.AbortRequest(request_id="mine"))
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() == grpc.StatusCode.ABORTED
    with pytest.raises(grpc.RpcError) as error:
        stub.Abort(pb.AbortRequest(request_id="nobody's"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    server.wait_idle()


def test_deadlines(server, stub, stubs):
    pb = stubs[0]
    for timeout in (0.0, 0.3):
        with pytest.raises(grpc.RpcError) as error:
            list(stub.Generate(request_of(pb, stopping=pb.StoppingParameters(max_tokens=100000, ignore_eos=True)), timeout=timeout))
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_idle()


def test_message_limit(server, stub, stubs):
    pb = stubs[0]
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Generate(request_of(pb, text="x" * (5 << 20))))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.alive()


def test_a_reader_that_stops_is_cancelled(make_server, stubs):
    pb, pb_grpc = stubs
    server = make_server("--max-requests", "2", "--stream-buffer-bytes", "8192")
    channel = grpc.insecure_channel(server.grpc_address, options=[("grpc.http2.bdp_probe", 0)])
    request = request_of(pb, stopping=pb.StoppingParameters(max_tokens=100000, ignore_eos=True),
                         response=pb.ResponseParameters(logprobs=20))
    call = pb_grpc.LinSpecStub(channel).Generate(request)
    next(call)          # and never again
    server.wait_idle(timeout=60)
    assert server.alive()
    call.cancel()


def test_overload_is_typed(make_server, stubs):
    pb, pb_grpc = stubs
    server = make_server("--max-requests", "1", "--max-queue-requests", "1")
    stub = pb_grpc.LinSpecStub(grpc.insecure_channel(server.grpc_address))
    long = pb.StoppingParameters(max_tokens=100000, ignore_eos=True)
    running = stub.Generate(request_of(pb, stopping=long))
    next(running)
    waiting = stub.Generate(request_of(pb, stopping=long))
    deadline = time.time() + 10
    while stub.GetStats(pb.GetStatsRequest()).requests_waiting == 0 and time.time() < deadline:
        time.sleep(0.02)
    with pytest.raises(grpc.RpcError) as error:
        next(stub.Generate(request_of(pb)))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details_of(error.value, error_details_pb2.RetryInfo).retry_delay.seconds >= 1
    response = complete(server)
    assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
    assert response.json()["error"]["type"] == "overloaded_error"
    running.cancel()
    waiting.cancel()
    server.wait_idle()


def test_cancel_storm_leaves_neighbours_alone(server, stub, stubs):
    pb = stubs[0]
    expected = complete(server, max_tokens=64).json()["choices"][0]["text"]
    result = {}

    def neighbour():
        result["text"] = complete(server, max_tokens=64).json()["choices"][0]["text"]

    thread = threading.Thread(target=neighbour)
    thread.start()
    calls = [stub.Generate(request_of(pb, stopping=pb.StoppingParameters(max_tokens=1000, ignore_eos=True))) for _ in range(40)]
    for index, call in enumerate(calls):
        if index % 3 == 0:
            time.sleep(0.005)
        call.cancel()
    thread.join()
    assert result["text"] == expected
    server.wait_idle()
    assert httpx.get(server.url + "/health").status_code == 200


def choices_of(responses, count):
    """Text, token ids and logprob entries of each choice, and the messages' ends."""
    choices = [{"text": "", "ids": [], "logprobs": [], "echoed": 0, "finish": 0} for _ in range(count)]
    for r in responses:
        choice = choices[r.index]
        assert choice["finish"] == 0   # nothing after a choice's last message
        choice["text"] += r.text
        choice["ids"] += r.token_ids
        choice["logprobs"] += r.logprobs
        choice["echoed"] += r.num_echoed_tokens
        choice["finish"] = r.finish_reason
    assert responses[-1].HasField("usage") and not any(r.HasField("usage") for r in responses[:-1])
    return choices


@pytest.mark.parametrize("rest, fields", [
    ({"n": 3}, {"n": 3}), ({"n": 2, "best_of": 4}, {"n": 2, "best_of": 4}), ({"best_of": 3}, {"best_of": 3}),
    ({"echo": True}, {"echo": True}), ({"echo": True, "logprobs": 2, "n": 2}, {"echo": True, "logprobs": 2, "n": 2}),
    ({"echo": True, "logprobs": 1, "best_of": 2}, {"echo": True, "logprobs": 1, "best_of": 2})])
def test_choices_equal_those_of_rest(server, stub, stubs, rest, fields):
    pb = stubs[0]
    want = complete(server, temperature=0.9, seed=7, **rest).json()
    request = request_of(pb, sampling=pb.SamplingParameters(temperature=0.9, seed=7), response=pb.ResponseParameters(**fields))
    responses = list(stub.Generate(request))
    got = choices_of(responses, len(want["choices"]))
    for choice, expected in zip(got, want["choices"]):
        assert choice["text"] == expected["text"] and choice["finish"] == pb.FINISH_REASON_LENGTH
        if "logprobs" in rest:
            entries = choice["logprobs"]
            assert [e.chosen.token for e in entries] == expected["logprobs"]["tokens"]
            numbers = [e.chosen.logprob if e.chosen.HasField("logprob") else None for e in entries]
            assert numbers == pytest.approx(expected["logprobs"]["token_logprobs"])
            assert [len(e.top) for e in entries[1:]] == [len(t) for t in expected["logprobs"]["top_logprobs"][1:]]
            assert choice["echoed"] == want["usage"]["prompt_tokens"]
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (want["usage"]["prompt_tokens"], want["usage"]["completion_tokens"])


def test_lists_of_prompts(server, stub, stubs):
    pb = stubs[0]
    ids = list(stub.Tokenize(pb.TokenizeRequest(text="The sea")).token_ids)
    want = [complete(server, prompt=prompt).json()["choices"][0]["text"] for prompt in ("Once upon a time", "The sea")]
    both = complete(server, prompt=["Once upon a time", "The sea"], n=2).json()["choices"]
    assert [c["text"] for c in both] == [want[0], want[0], want[1], want[1]]   # greedy: candidates agree
    request = request_of(pb, response=pb.ResponseParameters(n=2))
    request.prompts.prompts.add(text="Once upon a time")
    request.prompts.prompts.add().token_ids.ids.extend(ids)
    got = choices_of(list(stub.Generate(request)), 4)
    assert [c["text"] for c in got] == [want[0], want[0], want[1], want[1]]


def test_only_the_prompt_is_wanted(stub, stubs):
    pb = stubs[0]
    prompt = list(stub.Tokenize(pb.TokenizeRequest(text="Once upon a time")).token_ids)
    for logprobs in (None, 0):
        request = request_of(pb, stopping=pb.StoppingParameters(max_tokens=0),
                             response=pb.ResponseParameters(echo=True, token_ids=True, logprobs=logprobs))
        responses = list(stub.Generate(request))
        choice = choices_of(responses, 1)[0]
        assert choice["text"] == "Once upon a time" and choice["ids"] == prompt and choice["echoed"] == len(prompt)
        assert responses[-1].usage.completion_tokens == 0


def test_chat_equals_rest(server, stub, stubs, has_chat):
    if not has_chat:
        pytest.skip("the model has no chat template")
    pb = stubs[0]
    body = {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}], "temperature": 0,
            "max_tokens": 12}
    want = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
    request = pb.GenerateRequest(sampling=pb.SamplingParameters(temperature=0), stopping=pb.StoppingParameters(max_tokens=12))
    request.chat.messages.add(role="developer", content="Be brief.")
    request.chat.messages.add(role="user", content="Hello")
    assert "".join(r.text for r in stub.Generate(request)) == want


def test_abort_by_the_id_that_the_server_gave(server, stub, stubs):
    pb = stubs[0]
    request = request_of(pb, stopping=pb.StoppingParameters(max_tokens=100000, ignore_eos=True), response=pb.ResponseParameters(n=3))
    call = stub.Generate(request)
    heard = set()
    while len(heard) < 3:   # a choice may still wait for admission while another speaks
        message = next(call)
        heard.add(message.index)
    assert stub.GetStats(pb.GetStatsRequest()).slots_free == 5
    stub.Abort(pb.AbortRequest(request_id=message.request_id))
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() == grpc.StatusCode.ABORTED
    server.wait_idle()


def test_bad_fields_are_typed(stub, stubs):
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Generate(request_of(stubs[0], sampling=stubs[0].SamplingParameters(top_p=7))))
    violation = details_of(error.value, error_details_pb2.BadRequest).field_violations[0]
    assert violation.field == "top_p" and "7" in violation.description
