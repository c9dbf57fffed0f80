"""HTTP/1.1 over raw sockets, bad input over REST, connection limits."""
import email.utils
import json
import socket
import threading
import time

import httpx
import pytest

from conftest import complete

JSON = "Content-Type: application/json\r\n"


def talk(server, data, timeout=10, half_close=False):
    """Everything the server answers until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=timeout) as sock:
        sock.settimeout(timeout)
        try:
            sock.sendall(data if isinstance(data, bytes) else data.encode())
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        received = b""
        try:
            while chunk := sock.recv(65536):
                received += chunk
        except (socket.timeout, ConnectionResetError):
            pass
        return received.decode(errors="replace")


def status_of(answer):
    return int(answer.split(" ", 2)[1])


def request(method, path, body="", headers="", close=True):
    length = f"Content-Length: {len(body.encode())}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{JSON if body else ''}{headers}{length}" + \
        ("Connection: close\r\n" if close else "") + "\r\n" + body


def test_pipelined_requests_all_answered(server):
    body = json.dumps({"prompt": "x", "max_tokens": 2, "temperature": 0})
    data = request("GET", "/health", close=False) + request("POST", "/v1/completions", body, close=False) + \
        request("POST", "/v1/completions", json.dumps({**json.loads(body), "stream": True}), close=False) + \
        request("GET", "/version")
    answer = talk(server, data)
    assert answer.count("HTTP/1.1 200 OK") == 4 and answer.rindex('"version"') > answer.index("[DONE]")


def test_body_that_comes_after_its_head_was_read_ahead(server):
    body = json.dumps({"prompt": "x", "max_tokens": 2, "temperature": 0})
    whole = request("POST", "/v1/completions", body, close=False)
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=10) as sock:
        sock.sendall((whole + whole[:-len(body)]).encode())
        first = sock.recv(65536)  # answered with the second head already read
        sock.sendall(body.encode())
        second = sock.recv(65536)
    assert first.startswith(b"HTTP/1.1 200 OK") and second.startswith(b"HTTP/1.1 200 OK")


def test_targets_dates_and_codings(server):
    """What RFC 9110 and 9112 ask of a server and few clients use."""
    answer = talk(server, request("GET", f"http://127.0.0.1:{server.http_port}/version?x"))
    assert status_of(answer) == 200 and '"version"' in answer
    [date] = [line[6:] for line in answer.splitlines() if line.startswith("Date: ")]
    assert abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time()) < 60
    answer = talk(server, request("POST", "/tokenize", headers=JSON + "Transfer-Encoding: gzip, chunked\r\n") + "0\r\n\r\n")
    assert status_of(answer) == 501 and "Transfer-Encoding" in answer


def test_model_names_may_be_escaped(make_server):
    server = make_server("--served-model-name", "org/model 1", "--speculation", "off")
    assert httpx.get(server.url + "/v1/models/org%2Fmodel%201").json()["id"] == "org/model 1"
    missing = httpx.get(server.url + "/v1/models/org%2Fmodel")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert missing.json()["error"]["param"] == "model"
    server.stop()


def test_head_expect_and_1_0(server):
    answer = talk(server, request("HEAD", "/v1/models"))
    assert status_of(answer) == 200 and answer.endswith("\r\n\r\n") and "Content-Length: 0" not in answer
    body = json.dumps({"prompt": "x", "max_tokens": 2})
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=10) as sock:
        sock.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Expect: 100-continue\r\n"
                     f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 100 Continue")
        sock.sendall(body.encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 OK")
    assert status_of(talk(server, request("POST", "/tokenize", '{"prompt":"x"}', "Expect: tea\r\n"))) == 417
    stream = json.dumps({"prompt": "x", "max_tokens": 2, "stream": True})
    answer = talk(server, f"POST /v1/completions HTTP/1.0\r\n{JSON}Content-Length: {len(stream)}\r\n\r\n{stream}")
    assert status_of(answer) == 200 and "chunked" not in answer and answer.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("data, status", [
    ("garbage\r\n\r\n", 400), ("GET / HTTP/1.1\nHost: x\n\n", 400), ("GET /health HTTP/1.1\r\n\r\n", 400),
    ("GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400), ("GET /health HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    ("POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ("POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}", 400),
    ("POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    ("POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 524288000\r\n\r\n", 413),
    ("GET /health HTTP/1.1\r\nHost: x\r\nA: " + "a" * 100000 + "\r\n\r\n", 431),
    ("GET /health HTTP/1.1\r\nHost: x\r\n" + "".join(f"H{i}: v\r\n" for i in range(10000)) + "\r\n", 431),
    ("GET /" + "a" * 100000 + " HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    (request("GET", "/nowhere"), 404), (request("GET", "/v1/models/nope"), 404),
    (request("GET", "/v1/completions"), 405), (request("DELETE", "/health"), 405),
    (request("POST", "/v1/completions", "{}", "Content-Encoding: gzip\r\n"), 415),
    ("POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", 415)])
def test_refused_requests_get_typed_errors(server, data, status):
    answer = talk(server, data, timeout=5)
    assert status_of(answer) == status, answer[:300]
    body = answer.split("\r\n\r\n", 1)[1]
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert "\r\nAllow: " in answer


def send_in_pieces(server, data, pieces):
    """What is answered; the server may refuse before the end."""
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size = -(-len(data) // pieces)
        try:
            for begin in range(0, len(data), size):
                sock.sendall(data[begin:begin + size])
                time.sleep(0.02)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return sock.recv(65536).decode()


def test_header_limit_is_exact_however_a_head_is_cut(make_server, limit=1024):
    """Request line, headers and the empty line count, and nothing else."""
    server = make_server("--max-header-bytes", str(limit), "--max-requests", "1")
    body = '{"prompt":"x"}'
    for extra, status in ((0, 200), (1, 431), (limit // 4, 431)):
        headers = "".join(f"X-{i}: {'v' * 50}\r\n" for i in range(10)) + "X-Fill: "
        bare = len(request("POST", "/tokenize", body, headers + "\r\n")) - len(body)
        data = request("POST", "/tokenize", body, headers + "f" * (limit - bare + extra) + "\r\n").encode()
        assert data.index(b"\r\n\r\n") + 4 == limit + extra
        for pieces in (1, 2, 3, 16):
            assert status_of(send_in_pieces(server, data, pieces)) == status, (extra, pieces)


def test_endless_chunked_body_is_cut(server):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n".encode()
    assert status_of(talk(server, head + chunk * 200)) == 413


def test_slow_loris_and_half_close(server):
    start = time.time()
    answer = talk(server, "GET /health HTTP/1.1\r\nHost: x\r\nX-Slow", timeout=8)   # --header-timeout 2
    assert status_of(answer) == 408 and time.time() - start < 6
    body = json.dumps({"prompt": "x", "max_tokens": 100000, "ignore_eos": True})
    talk(server, request("POST", "/v1/completions", body), timeout=5, half_close=True)
    server.wait_idle()


BAD = [
    ({"n": 0}, "n"), ({"n": -1}, "n"), ({"n": 2**31}, "n"), ({"n": 10**9}, "n"), ({"best_of": 1, "n": 2}, "best_of"),
    ({"n": 16, "prompt": ["a"] * 16}, "prompt"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"), ({"prompt": None}, "prompt"), ({"temperature": 1e308}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": True}, "top_p"), ({"min_p": -0.1}, "min_p"),
    ({"top_k": 2**31}, "top_k"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {str(i): 1 for i in range(10**5)}}, "logit_bias"),
    ({"logit_bias": {"1": "NaN"}}, "logit_bias"), ({"prompt": [-1]}, "prompt"), ({"prompt": [2**32]}, "prompt"),
    ({"prompt": [10**8]}, "prompt"), ({"prompt": [[1], 2]}, "prompt"), ({"prompt": [[[1]]]}, "prompt"),
    ({"prompt": [1] * 200000}, "prompt"), ({"stop": [""]}, "stop"), ({"stop": "x" * 10**6}, "stop"),
    ({"stop": ["x"] * 10**5}, "stop"), ({"stop": 5}, "stop"), ({"seed": 2**64}, "seed"), ({"logprobs": 21}, "logprobs"),
    ({"suffix": "x"}, "suffix"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"no_such_field": 1}, "no_such_field"),
    ({"speculation": "magic"}, "speculation"), ({"priority": 10**9}, "priority"), ({"store": True}, "store")]


@pytest.mark.parametrize("fields, name", BAD, ids=[f"{i}-{name}" for i, (_, name) in enumerate(BAD)])
def test_bad_fields_name_themselves(server, fields, name):
    response = complete(server, **fields)
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert error["param"] == name and name in error["message"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'{"prompt":"x","prompt":"y"}', b'{"prompt":"x","temperature":1e400}',
    b'{"prompt":"x","temperature":NaN}', b'{"prompt":"\xff\xfe"}', b'{"prompt":"\\ud800"}', b'{"prompt":' + b"[" * 100000,
    b'{"prompt":"x"}trailing', b"\xef\xbb\xbf{}x", b'{"prompt":"x"' + b" " * 100000])
def test_bad_json(server, body):
    response = httpx.post(server.url + "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_bad_messages(server):
    for messages, name in (([], "messages"), ("hi", "messages"), ([{"role": "user"}], "messages[0].content"),
                           ([{"role": "wizard", "content": "x"}], "messages[0].role"),
                           ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}],
                            "messages[0].content"),
                           ([{"role": "user", "content": "x"}] * 5000, "messages")):
        error = httpx.post(server.url + "/v1/chat/completions", json={"messages": messages}).json()["error"]
        assert error["param"] == name, error
    for field in ("chat_template", "chat_template_kwargs", "functions"):
        body = {"messages": [{"role": "user", "content": "x"}], field: {"a": 1}}
        assert httpx.post(server.url + "/v1/chat/completions", json=body).json()["error"]["param"] == field


@pytest.mark.parametrize("prompt", ["   \n\t", "\u0000", "\ufeffBOM", "\u202ereversed", "a\u0300" * 50, "🙂" * 20, "<|endoftext|>"])
def test_odd_text_is_served(server, prompt):
    assert complete(server, prompt=prompt, max_tokens=4).status_code == 200


def test_extreme_but_legal_values(server):
    for fields in ({"temperature": 1e-45}, {"temperature": -0.0}, {"top_p": 1e-30, "temperature": 1}, {"top_k": 2**31 - 1},
                   {"logit_bias": {str(i): -100 for i in range(1024)}, "temperature": 1}, {"seed": -1}, {"seed": 2**63 - 1},
                   {"repetition_penalty": 1e-3}, {"priority": -100000}):
        assert complete(server, **fields).status_code == 200, fields


def test_neighbours_do_not_notice(server):
    expected = complete(server, max_tokens=96).json()["choices"][0]["text"]
    texts = []

    def neighbour():
        texts.append(complete(server, max_tokens=96).json()["choices"][0]["text"])

    threads = [threading.Thread(target=neighbour) for _ in range(4)]
    for thread in threads:
        thread.start()
    for fields, _ in BAD[:20]:
        complete(server, **fields)
    for _ in range(20):   # gone before the answer: queued, in prefill, while streaming
        with socket.create_connection(("127.0.0.1", server.http_port)) as sock:
            body = json.dumps({"prompt": "word " * 200, "max_tokens": 1000, "stream": True, "ignore_eos": True})
            sock.sendall(request("POST", "/v1/completions", body).encode())
            sock.settimeout(0.02)
            try:
                sock.recv(100)
            except socket.timeout:
                pass
    for thread in threads:
        thread.join()
    assert texts == [expected] * 4
    server.wait_idle()
    assert server.alive()


def test_reader_that_stops_is_cancelled(make_server):
    server = make_server("--max-requests", "2", "--stream-buffer-bytes", "8192", "--idle-timeout", "600")
    with socket.create_connection(("127.0.0.1", server.http_port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"prompt": "x", "max_tokens": 100000, "stream": True, "ignore_eos": True, "logprobs": 20})
        sock.sendall(request("POST", "/v1/completions", body).encode())
        sock.recv(100)
        server.wait_idle(timeout=60)
        deadline = time.time() + 10
        while server.metric("linspec_http_connections_open") > 1 and time.time() < deadline:   # the one that asks
            time.sleep(0.05)
        assert server.metric("linspec_http_connections_open") == 1


def test_connection_limit_and_request_id(make_server):
    server = make_server("--max-connections", "4")
    held = [socket.create_connection(("127.0.0.1", server.http_port)) for _ in range(4)]
    time.sleep(0.3)
    assert status_of(talk(server, request("GET", "/health"))) == 503
    for sock in held:
        sock.close()
    time.sleep(0.3)
    response = httpx.get(server.url + "/version", headers={"X-Request-Id": "abc-1"})
    assert response.headers["X-Request-Id"] == "abc-1"
    assert httpx.get(server.url + "/version", headers={"X-Request-Id": "bad id"}).headers["X-Request-Id"] != "bad id"


def test_metrics_have_bounded_labels(server):
    for path in ("/a", "/b", "/v1/models/one", "/v1/models/two"):
        httpx.get(server.url + path)
    httpx.request("BREW", server.url + "/health")
    text = httpx.get(server.url + "/metrics").text
    assert 'handler="other"' in text and "BREW" not in text and "/a" not in text and 'two"' not in text
    for name in ("linspec_time_to_first_token_seconds_bucket", "linspec_inter_token_latency_seconds_count",
                 "linspec_generation_tokens_total", "linspec_request_success_total", "linspec_step_stage_seconds_sum"):
        assert name in text
