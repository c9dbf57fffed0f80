"""The groups of bad input that have broken servers like this one, each on REST and on gRPC: a typed error, the server
alive, a neighbour's text bit-identical meanwhile, no slot leaked. The groups that come before any request (model files,
heads, disks, signals) are in test_bad_files.py, those about keys in test_operations.py.
"""
import json
import socket
import threading

import grpc
import httpx
import pytest

from conftest import complete

OK = "served"
PATIENCE = 300  # seconds; under ThreadSanitizer on a busy machine 100,000 strings in one message take 10
BIG = 2**31 - 1
NAN, INF = float("nan"), float("inf")


class Rest:
    """fields of a completion; or path and raw body. want: a status, or (400 with) the field to blame, or OK."""

    def __init__(self, want, fields=None, path="/v1/completions", raw=None, headers=None):
        self.want, self.fields, self.path, self.raw, self.headers = want, fields, path, raw, headers or {}

    def run(self, server):
        body = self.raw
        if body is None:
            base = {"prompt": "x"} if self.path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
            body = json.dumps({**base, "max_tokens": 4, **self.fields}).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        response = httpx.post(server.url + self.path, content=body, headers=headers, timeout=PATIENCE)
        if self.want == OK:
            assert response.status_code == 200, response.text[:200]
            return
        want = self.want if isinstance(self.want, int) else 400
        assert response.status_code == want, response.text[:200]
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        if isinstance(self.want, str):
            assert error["param"].startswith(self.want), error


class Grpc:
    """change(pb, request) on a good request. want: (INVALID_ARGUMENT with) the field to blame, a status code, or OK."""

    def __init__(self, want, change=None, raw=None, **call):
        self.want, self.change, self.raw, self.call = want, change, raw, call

    def run(self, stub, pb, channel):
        request = pb.GenerateRequest(text="x", stopping=pb.StoppingParameters(max_tokens=4))
        if self.change:
            self.change(pb, request)
        raw = self.raw if self.raw is not None else request.SerializeToString()
        method = channel.unary_stream("/linspec.v1.LinSpec/Generate", request_serializer=lambda data: data,
                                      response_deserializer=pb.GenerateResponse.FromString)
        if self.want == OK:
            assert list(method(raw, timeout=PATIENCE, **self.call))[-1].finish_reason
            return
        with pytest.raises(grpc.RpcError) as error:
            list(method(raw, timeout=PATIENCE, **self.call))
        want = self.want if isinstance(self.want, grpc.StatusCode) else grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.code() == want, error.value.details()
        if isinstance(self.want, str):
            assert self.want in error.value.details()


def sampling(**fields):
    return lambda pb, request: request.sampling.MergeFrom(pb.SamplingParameters(**fields))


def stopping(**fields):
    return lambda pb, request: request.stopping.MergeFrom(pb.StoppingParameters(**fields))


def response(**fields):
    return lambda pb, request: request.response.MergeFrom(pb.ResponseParameters(**fields))


def ids(*values):
    return lambda pb, request: request.token_ids.ids.extend(values)


def prompts(count, **more):
    def change(pb, request):
        request.prompts.prompts.extend([pb.Prompt(text="x")] * count)
        request.response.MergeFrom(pb.ResponseParameters(**more))
    return change


def text(value):
    return lambda pb, request: setattr(request, "text", value)


def messages(count, role="user"):
    return lambda pb, request: request.chat.messages.extend([pb.ChatMessage(role=role, content="x")] * count)


def extra_field(number, payload):
    """A good request with a field that the proto does not have."""
    head = (number << 3 | 2).to_bytes(1, "big") if number < 16 else bytes([(number << 3 | 2) & 0x7F | 0x80, number >> 4])
    return b"\x12\x01x" + head + bytes([len(payload)]) + payload


def chat(want, **fields):
    return Rest(want, fields, path="/v1/chat/completions")


LIMIT = grpc.StatusCode.RESOURCE_EXHAUSTED
NESTED = {"type": "json_schema", "json_schema": {"name": "s", "schema": json.loads('{"a":' * 20 + "1" + "}" * 20)}}

GROUPS = {
    "1 counts": [
        *[Rest("n", {"n": n}) for n in (0, -1, 2**31, 10**9, 1.5, "2")], Rest("best_of", {"n": 2, "best_of": 1}),
        Rest("best_of", {"best_of": 10**9}), Rest("prompt", {"n": 8, "prompt": ["x"] * 8}),
        *[Grpc("n", response(n=n)) for n in (0, -1, BIG)], Grpc("best_of", response(n=2, best_of=1)),
        Grpc("best_of", response(best_of=BIG)), Grpc("prompt", prompts(8, n=8)), Grpc("prompt", prompts(1000))],
    "2 lengths": [
        *[Rest("max_tokens", {"max_tokens": n}) for n in (0, -1, 2**63, 2**64, BIG)], Rest("prompt", {"prompt": ""}),
        Rest("prompt", {"prompt": "a " * 9000}), Rest("prompt", {"prompt": []}), chat("messages", messages=[]),
        Rest(OK, {"prompt": " \n\t "}), Rest("min_tokens", {"min_tokens": 5}),
        *[Grpc("max_tokens", stopping(max_tokens=n)) for n in (0, -1, BIG)], Grpc("prompt", text("")),
        Grpc("prompt", text("a " * 9000)), Grpc("messages", raw=b"\x22\x00"),
        Grpc(OK, text(" \n\t ")), Grpc("min_tokens", stopping(min_tokens=5)), Grpc("prompt", raw=b"\x5a\x00")],
    "3 numbers": [
        *[Rest(name, {name: value}) for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty")
          for value in (1e308, -1e308, "0.5", True)],
        *[Rest(400, raw=b'{"prompt":"x","temperature":' + word + b"}") for word in (b"NaN", b"Infinity", b"-Infinity", b"1e400")],
        Rest("top_p", {"top_p": 0}), Rest("top_k", {"top_k": 2**31}), Rest(OK, {"temperature": -0.0}),
        Rest(OK, {"temperature": 1e-45}), Rest("seed", {"seed": 2**64}),
        *[Grpc(name, sampling(**{name: value})) for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty")
          for value in (NAN, INF, -INF, 3e38)],
        Grpc("top_p", sampling(top_p=0)), Grpc("top_k", sampling(top_k=-2)), Grpc(OK, sampling(temperature=-0.0)),
        Grpc(OK, sampling(temperature=1e-45)), Grpc(OK, sampling(top_k=BIG, seed=2**64 - 1))],
    "4 logit_bias": [
        *[Rest("logit_bias", {"logit_bias": bias}) for bias in (
            {"99999999": 1}, {"-1": 1}, {"x": 1}, {"1.0": 1}, {str(i): 0 for i in range(10**5)}, {"1": "NaN"}, {"1": 1e308}, [1])],
        *[Grpc("logit_bias", sampling(logit_bias=bias)) for bias in (
            {BIG: 1}, {-1: 1}, {i: 0 for i in range(10**5)}, {1: NAN}, {1: INF}, {1: -101})]],
    "5 token ids": [
        *[Rest("prompt", {"prompt": value}) for value in ([10**8], [-1], [2**32], [1.5], [[1], 2], [[[1]]], [["x"]], [None], {}, 7)],
        Rest(413, raw=b'{"prompt":[' + b"1," * 10**7 + b"1]}"), Rest("prompt", {"prompt": [1] * 9000}),
        Rest("stop_token_ids", {"stop_token_ids": [-1]}), Rest("stop_token_ids", {"stop_token_ids": [1] * 10**5}),
        Grpc("prompt", ids(10**8)), Grpc("prompt", ids(-1)), Grpc("prompt", ids(*[1] * 9000)), Grpc(LIMIT, ids(*[1] * 10**7)),
        Grpc("prompt", lambda pb, request: request.prompts.prompts.add()), Grpc("stop_token_ids", stopping(stop_token_ids=[-1])),
        Grpc("stop_token_ids", stopping(stop_token_ids=[1] * 10**5))],
    "6 text": [
        *[Rest("stop", {"stop": stop}) for stop in (["x"] * 10**5, [""], "", "x" * 10**6, [1])],
        Rest(400, raw=b'{"prompt":"\xff\xfe"}'), Rest(400, raw=b'{"prompt":"\\ud800"}'), Rest(400, raw=b'{"prompt":"\xed\xa0\x80"}'),
        *[Rest(OK, {"prompt": value}) for value in ("\0", "\ufeffx", "\u202ex", "<|im_end|>", "e\u0301" * 100)],
        Rest(OK, {"stop": ["\u20ac", "\U0001f642"]}),
        *[Grpc("stop", stopping(stop=stop)) for stop in (["x"] * 10**5, [""], ["x" * 10**6])],
        Grpc("request", raw=b"\x12\x02\xff\xfe"), Grpc("request", raw=b"\x12\x03\xed\xa0\x80"),
        *[Grpc(OK, text(value)) for value in ("\0", "\ufeffx", "\u202ex", "<|im_end|>", "e\u0301" * 100)],
        Grpc(OK, stopping(stop=["\u20ac", "\U0001f642"]))],
    "7 encodings": [
        *[Rest(400, raw=raw) for raw in (b"", b"{", b"[]", b"null", b'{"prompt":"x","prompt":"y"}', b'{"prompt":"x"}{}',
                                         b'{"prompt":' + b"[" * 10**5, b'{"a":' * 10**5, b'{"prompt":"x","max_tokens":1e400}')],
        Rest(415, {}, headers={"Content-Type": "text/plain"}), Rest(415, {}, headers={"Content-Encoding": "gzip"}),
        Rest("no_such_field", {"no_such_field": 1}),
        *[Grpc("request", raw=raw) for raw in (b"\xff" * 9, b"\x12\xff\xff\xff\xff\x0f", b"\x12\x05x", b"\x0a" * 10**5)],
        Grpc(LIMIT, text("x" * (50 << 20)), compression=grpc.Compression.Gzip)],
    "10 grammars": [
        *[Rest("response_format", {"response_format": value}) for value in (
            {"type": "json_object"}, NESTED, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
            {"type": "json_schema", "json_schema": {"schema": {"enum": list(range(10**5))}}}, {"type": "regex", "regex": "(a+)+$"})],
        Rest(400, raw=b'{"prompt":"x","response_format":' + b'{"a":' * 60000 + b"1" + b"}" * 60001),
        *[Rest(name, {name: "(a+)+$"}) for name in ("guided_regex", "guided_json", "grammar", "structured_outputs")],
        *[Grpc("unknown field", raw=extra_field(number, b"(a+)+$")) for number in (15, 99)]],
    "11 tools": [
        *[chat("tools", tools=value) for value in (
            [{}], [{"type": "function", "function": {"name": "\x00\n"}}], [{"type": "function"}] * 10**4, "x")],
        chat("tool_choice", tool_choice={"type": "function", "function": {"name": "none such"}}), chat("tool_choice", tool_choice="auto"),
        chat("messages[0].role", messages=[{"role": "tool", "content": "x"}]),
        chat("messages[0].tool_calls", messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
        Grpc("role", messages(1, role="tool")), Grpc("role", messages(1, role="wizard")), Grpc("role", messages(1, role="")),
        Grpc("unknown field", raw=extra_field(14, b"tools"))],
    "12 templates": [
        *[chat(name, **{name: value}) for name, value in (
            ("chat_template", "{% for i in range(10**9) %}x{% endfor %}"), ("chat_template_kwargs", {"tokenize": True}),
            ("add_generation_prompt", False), ("continue_final_message", True))],
        chat("messages", messages=[{"role": "user", "content": "x"}] * 5000),
        Rest(413, raw=b'{"messages":[' + b'{"role":"user","content":"x"},' * 10**6 + b"{}]}", path="/v1/chat/completions"),
        Grpc("messages", messages(5000)), Grpc(LIMIT, messages(10**6))],
    "18 label values": [
        *[Rest(404, {"model": f"model-{i}"}) for i in range(20)], *[Rest(OK, {"user": f"user-{i}"}) for i in range(3)],
        *[Grpc(grpc.StatusCode.NOT_FOUND, lambda pb, request, i=i: setattr(request, "model", f"model-{i}")) for i in range(20)]],
}


@pytest.fixture(scope="module")
def target(make_server):
    return make_server("--max-requests", "8", "--header-timeout", "2", "--max-prompt-tokens", "4096")


@pytest.fixture(scope="module")
def solo(target):
    """What the neighbour says when it is alone."""
    return neighbour_text(target)


def neighbour_text(server):
    return complete(server, max_tokens=48, temperature=0.9, seed=5).json()["choices"][0]["text"]


class Neighbour:
    """Generates all the while; each of its texts must be the one it says alone, and afterwards every slot is free."""

    def __init__(self, server, solo):
        self.server, self.solo, self.texts, self.done = server, solo, [], threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self):
        while not self.done.is_set() or not self.texts:
            self.texts.append(neighbour_text(self.server))

    def __exit__(self, kind, *_):
        self.done.set()
        self.thread.join()
        if kind is None:
            assert set(self.texts) == {self.solo}
            self.server.wait_idle()
            assert self.server.alive() and httpx.get(self.server.url + "/ready").status_code == 200


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("protocol", [Rest, Grpc])
def test_group(target, solo, stubs, has_chat, group, protocol):
    pb, pb_grpc = stubs
    cases = [case for case in GROUPS[group] if isinstance(case, protocol)]
    assert cases
    with Neighbour(target, solo), grpc.insecure_channel(target.grpc_address, options=[
            ("grpc.max_send_message_length", -1)]) as channel:
        stub = pb_grpc.LinSpecStub(channel)
        for case in cases:
            case.run(target) if protocol is Rest else case.run(stub, pb, channel)


def send_raw(port, data, read=True):
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        try:
            sock.sendall(data)
            return sock.recv(65536) if read else b""
        except OSError:   # reset: the server hung up first
            return b""


def test_8_http_garbage(target, solo):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with Neighbour(target, solo):
        for data, status in (
                (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 10**4 + b"\r\n", 431),
                (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 10**6 + b"\r\n\r\n", 431),
                (head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
                (head + b"Content-Length: 524288000\r\n\r\n", 413), (head + b"Content-Length: -5\r\n\r\n", 400),
                (head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", 400), (b"\x16\x03\x01\x02\x00" * 20, 400), (b"\x00" * 5000, 400),
                (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400)):
            assert send_raw(target.http_port, data).startswith(b"HTTP/1.1 %d " % status), data[:60]
        for _ in range(50):   # half a request, and away
            send_raw(target.http_port, head + b"Content-Length: 100\r\n\r\n{", read=False)


def test_8_grpc_garbage(target, solo, stubs):
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    frames = {"settings": b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", "rst of nothing": b"\x00\x00\x04\x03\x00\x00\x00\x00\x07\x00\x00\x00\x08",
              "huge length": b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", "continuation": b"\x00\x00\x01\x09\x00\x00\x00\x00\x01\x00",
              "window overflow": b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\xff\xff\xff" * 3}
    with Neighbour(target, solo):
        for frame in frames.values():
            send_raw(target.grpc_port, preface + frames["settings"] + frame)
        send_raw(target.grpc_port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        send_raw(target.grpc_port, b"\x00" * 5000)
        stub = stubs[1].LinSpecStub(grpc.insecure_channel(target.grpc_address))
        with pytest.raises(grpc.RpcError) as error:   # metadata over --max-header-bytes
            stub.GetModel(stubs[0].GetModelRequest(), metadata=(("x", "y" * 100000),), timeout=PATIENCE)
        assert error.value.code() == LIMIT


def test_9_grpc_calls(target, solo, stubs):
    pb, pb_grpc = stubs
    channel = grpc.insecure_channel(target.grpc_address)
    stub = pb_grpc.LinSpecStub(channel)
    long = pb.StoppingParameters(max_tokens=4000, ignore_eos=True)
    with Neighbour(target, solo):
        for case in (Grpc("speculation", lambda pb, request: setattr(request, "speculation", 99)), Grpc("prompt", raw=b""),
                     Grpc(LIMIT, text("x" * (5 << 20))), Grpc("request_id", lambda pb, request: setattr(request, "request_id", "x" * 129)),
                     Grpc("priority", lambda pb, request: setattr(request, "priority", BIG)), Grpc("logprobs", response(logprobs=21)),
                     Grpc("logprobs", response(logprobs=-1)), Grpc("stop", lambda pb, request: request.MergeFrom(pb.GenerateRequest(
                         stopping=pb.StoppingParameters(stop=["x"]), response=pb.ResponseParameters(skip_text=True))))):
            case.run(stub, pb, channel)
        with pytest.raises(grpc.RpcError) as error:
            list(stub.Generate(pb.GenerateRequest(text="x"), timeout=0))
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        for name in ("", "nobody", "\0", "x" * 10**6):
            with pytest.raises(grpc.RpcError) as error:
                stub.Abort(pb.AbortRequest(request_id=name))
            assert error.value.code() == grpc.StatusCode.NOT_FOUND
        mine = stub.Generate(pb.GenerateRequest(text="x", request_id="mine", stopping=long))
        next(mine)
        with pytest.raises(grpc.RpcError) as error:
            next(stub.Generate(pb.GenerateRequest(text="x", request_id="mine")))
        assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS
        mine.cancel()
        for _ in range(300):   # rapid reset
            stub.Generate(pb.GenerateRequest(text="x", stopping=long)).cancel()


def test_13_leaving_at_every_phase(target, solo, stubs):
    pb, pb_grpc = stubs
    body = json.dumps({"prompt": "word " * 600, "max_tokens": 2000, "stream": True, "ignore_eos": True}).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with Neighbour(target, solo):
        for amount in (10, 90, len(post) - 1, len(post)):          # before the headers end, in the body, complete
            for wait in (None, 0.001, 0.05, 0.3):                  # at once, queued, in prefill, in decode
                with socket.create_connection(("127.0.0.1", target.http_port), timeout=PATIENCE) as sock:
                    sock.sendall(post[:amount])
                    if wait:
                        sock.settimeout(wait)
                        try:
                            sock.recv(10)
                        except TimeoutError:
                            pass
        stub = pb_grpc.LinSpecStub(grpc.insecure_channel(target.grpc_address))
        request = pb.GenerateRequest(text="word " * 600, stopping=pb.StoppingParameters(max_tokens=2000, ignore_eos=True))
        for messages_read in (0, 0, 1, 5):
            for _ in range(12):   # more than there are slots: some leave from the queue
                call = stub.Generate(request)
                for _ in range(messages_read):
                    next(call)
                call.cancel()
        short = pb.GenerateRequest(text="x", stopping=pb.StoppingParameters(max_tokens=1))
        for _ in range(20):   # as the last token comes
            call = stub.Generate(short)
            next(call)
            call.cancel()
