"""Keys, TLS, CORS, draining, start-up errors."""
import hashlib
import json
import signal
import socket
import ssl
import subprocess
import threading
import time

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import BINARY, complete

PUBLIC = {"/health", "/ping", "/ready", "/version"}


def test_keys_cover_every_route_of_both_protocols(make_server, stubs, tmp_path):
    pb, pb_grpc = stubs
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst-key\nsha256:" + hashlib.sha256(b"second-key").hexdigest() + "\n")
    server = make_server("--api-key-file", str(keys), "--public-metrics", "false", "--max-requests-per-key", "1")
    document = httpx.get(server.url + "/openapi.json", headers={"Authorization": "Bearer first-key"}).json()
    wrong = [{}, {"Authorization": "Bearer FIRST-KEY"}, {"Authorization": "Bearer first"}, {"Authorization": "first-key"},
             {"Authorization": "Bearer " + "x" * 10000}]
    for path, methods in document["paths"].items():
        for method in methods:
            for headers in wrong:
                response = httpx.request(method.upper(), server.url + path + "?api_key=first-key", headers=headers)
                assert response.status_code == (200 if path in PUBLIC else 401), (path, headers)
    for key in ("first-key", "second-key"):
        assert httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200

    stub = pb_grpc.LinSpecStub(grpc.insecure_channel(server.grpc_address))
    calls = [lambda m: list(stub.Generate(pb.GenerateRequest(text="x"), metadata=m)),
             lambda m: stub.Tokenize(pb.TokenizeRequest(text="x"), metadata=m),
             lambda m: stub.Detokenize(pb.DetokenizeRequest(token_ids=[1]), metadata=m),
             lambda m: stub.GetModel(pb.GetModelRequest(), metadata=m), lambda m: stub.GetStats(pb.GetStatsRequest(), metadata=m),
             lambda m: stub.Abort(pb.AbortRequest(request_id="x"), metadata=m)]
    for call in calls:
        for metadata in ((), (("authorization", "Bearer FIRST-KEY"),)):
            with pytest.raises(grpc.RpcError) as error:
                call(metadata)
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    good = (("authorization", "Bearer first-key"),)
    assert stub.GetModel(pb.GetModelRequest(), metadata=good).name

    # One open request a key; another key's request cannot be aborted, nor seen.
    stopping = pb.StoppingParameters(max_tokens=100000, ignore_eos=True)
    running = stub.Generate(pb.GenerateRequest(text="x", request_id="r", stopping=stopping), metadata=good)
    next(running)
    limited = httpx.post(server.url + "/v1/completions", json={"prompt": "x"}, headers={"Authorization": "Bearer first-key"})
    assert limited.status_code == 429 and "Retry-After" in limited.headers
    with pytest.raises(grpc.RpcError) as error:
        stub.Abort(pb.AbortRequest(request_id="r"), metadata=(("authorization", "Bearer second-key"),))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    running.cancel()

    time.sleep(1.1)
    keys.write_text("third-key\n")      # without a restart
    time.sleep(1.1)
    assert httpx.get(server.url + "/v1/models", headers={"Authorization": "Bearer first-key"}).status_code == 401
    assert httpx.get(server.url + "/v1/models", headers={"Authorization": "Bearer third-key"}).status_code == 200


def test_mutual_tls(make_server, stubs, certificates):
    pb, pb_grpc = stubs
    path = str(certificates)
    server = make_server("--tls-cert", path + "/server.pem", "--tls-key", path + "/server.key", "--tls-client-ca", path + "/ca.pem")
    url = f"https://127.0.0.1:{server.http_port}"
    anonymous = ssl.create_default_context(cafile=path + "/ca.pem")
    known = ssl.create_default_context(cafile=path + "/ca.pem")
    known.load_cert_chain(path + "/client.pem", path + "/client.key")
    with httpx.Client(verify=known) as client:
        body = {"prompt": "x", "max_tokens": 4, "stream": True}
        assert client.post(url + "/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
    with pytest.raises(httpx.TransportError):
        httpx.get(url + "/health", verify=anonymous)
    ca = (certificates / "ca.pem").read_bytes()
    channel = grpc.secure_channel(server.grpc_address, grpc.ssl_channel_credentials(
        ca, (certificates / "client.key").read_bytes(), (certificates / "client.pem").read_bytes()))
    assert pb_grpc.LinSpecStub(channel).GetModel(pb.GetModelRequest(), timeout=10).name
    with pytest.raises(grpc.RpcError):
        nobody = grpc.secure_channel(server.grpc_address, grpc.ssl_channel_credentials(ca))
        pb_grpc.LinSpecStub(nobody).GetModel(pb.GetModelRequest(), timeout=5)


def test_cors_is_opt_in(make_server, server):
    assert httpx.options(server.url + "/v1/completions").status_code == 405
    open_server = make_server("--cors-origin", "https://example.org", "--metrics-alias", "vllm")
    answer = httpx.options(open_server.url + "/v1/completions")
    assert answer.status_code == 204 and answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    assert {"Authorization", "*"} <= set(answer.headers["Access-Control-Allow-Headers"].split(", "))  # SDKs send their own
    assert httpx.get(open_server.url + "/v1/models").headers["Access-Control-Allow-Origin"] == "https://example.org"
    assert "vllm:num_requests_running{" in httpx.get(open_server.url + "/metrics").text


def test_metrics_can_be_switched_off(make_server):
    server = make_server("--metrics", "false")
    assert complete(server).status_code == 200
    answer = httpx.get(server.url + "/metrics")
    assert answer.status_code == 404 and "--metrics" in answer.json()["error"]["message"]


def events(server):
    """The log's lines as JSON; the greeting is one of them."""
    return [json.loads(line) for line in server.log().splitlines() if line]


def wait_for_event(server, request_id, event):
    deadline = time.time() + 10
    while time.time() < deadline:
        for line in events(server):
            if line["event"] == event and line.get("request_id") == request_id:
                return line
        time.sleep(0.05)
    raise AssertionError(f"no {event!r} of {request_id} in\n{server.log()}")


def test_json_log_has_request_ids_and_no_prompts(make_server, stubs):
    pb, pb_grpc = stubs
    for log_prompts in ("false", "true"):
        server = make_server("--log-format", "json", "--log-prompts", log_prompts)
        assert [line["event"] for line in events(server)] == ["ready"]
        answer = httpx.post(server.url + "/v1/completions", headers={"X-Request-Id": "plain-1"},
                            json={"prompt": "A secret \"rendezvous\"", "max_tokens": 4, "seed": 7, "ignore_eos": True})
        assert answer.headers["X-Request-Id"] == "plain-1"
        done = wait_for_event(server, "plain-1", "request finished")
        assert done["output_tokens"] == 4 and done["seed"] == "7" and done["finish_reason"] == "length"
        assert 0 <= done["queue_ms"] <= done["ttft_ms"] <= done["e2e_ms"]
        stub = pb_grpc.LinSpecStub(grpc.insecure_channel(server.grpc_address))
        stopping = pb.StoppingParameters(max_tokens=3, ignore_eos=True)
        list(stub.Generate(pb.GenerateRequest(text="A secret rendezvous", request_id="rpc-1", stopping=stopping)))
        assert wait_for_event(server, "rpc-1", "request finished")["output_tokens"] == 3
        bad = httpx.post(server.url + "/v1/completions", headers={"X-Request-Id": "bad-1"},
                         json={"prompt": "rendezvous", "temperature": -1})
        assert bad.status_code == 400
        refused = wait_for_event(server, "bad-1", "request refused")
        assert refused["param"] == "temperature" and refused["status"] == 400
        if log_prompts == "true":
            assert "rendezvous" in wait_for_event(server, "plain-1", "prompt")["text"]
        else:
            assert "rendezvous" not in server.log()


def test_a_full_disk_for_logs_stops_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        ports = []
        for _ in range(2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                ports.append(str(probe.getsockname()[1]))
        process = subprocess.Popen([BINARY, "serve", "--http-port", ports[0], "--grpc-port", ports[1], "--log-format", "json"],
                                   stdout=full)
    try:
        url = f"http://127.0.0.1:{ports[0]}"
        deadline = time.time() + 60
        while time.time() < deadline:
            try:
                if httpx.get(url + "/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        for _ in range(3):
            assert httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60).status_code == 200
        lost = [line for line in httpx.get(url + "/metrics").text.splitlines() if line.startswith("linspec_log_lines_lost_total ")]
        assert float(lost[0].split()[1]) >= 3
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_metrics_of_both_protocols(make_server, stubs):
    pb, pb_grpc = stubs
    server = make_server()
    stub = pb_grpc.LinSpecStub(grpc.insecure_channel(server.grpc_address))
    list(stub.Generate(pb.GenerateRequest(text="x", stopping=pb.StoppingParameters(max_tokens=2))))
    with pytest.raises(grpc.RpcError):
        list(stub.Generate(pb.GenerateRequest(stopping=pb.StoppingParameters(max_tokens=2))))
    assert complete(server).status_code == 200
    assert httpx.get(server.url + "/no/such/path").status_code == 404
    wanted = [("linspec_grpc_requests_total", 'code="OK"', 'method="Generate"'),
              ("linspec_grpc_requests_total", 'code="INVALID_ARGUMENT"', 'method="Generate"'),
              ("linspec_http_requests_total", 'handler="other"', 'method="GET"', 'status="404"'),
              ("linspec_request_success_total", 'finished_reason="length"')]
    wanted += [("linspec_step_stage_seconds_count", f'stage="{stage}"')
               for stage in ("queue", "prefill", "draft", "verify", "accept", "commit", "deliver")]
    wanted += [("linspec_response_stage_seconds_count", f'stage="{stage}"') for stage in ("detokenize", "write")]
    deadline = time.time() + 10     # a call is counted when it is torn down, just after the client has its status
    while True:
        text = httpx.get(server.url + "/metrics").text
        counted = [line for line in text.splitlines() if not line.startswith("#") and not line.endswith(" 0")]
        missing = [parts for parts in wanted if not any(all(part in line for part in parts) for line in counted)]
        if not missing or time.time() > deadline:
            break
        time.sleep(0.05)
    assert not missing
    assert "/no/such/path" not in text      # labels come from fixed lists


def stream(server, tokens, out):
    body = {"prompt": "Once", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
        out["started"] = True
        out["lines"] = [line for line in response.iter_lines() if line]


def start_stream(server, tokens):
    out = {}
    thread = threading.Thread(target=stream, args=(server, tokens, out))
    thread.start()
    while "started" not in out:
        time.sleep(0.01)
    time.sleep(0.1)
    return thread, out


def test_sigterm_finishes_what_runs(make_server):
    server = make_server("--drain-timeout", "300")
    channel = grpc.insecure_channel(server.grpc_address)
    health = health_pb2_grpc.HealthStub(channel)
    health.Check(health_pb2.HealthCheckRequest())
    thread, out = start_stream(server, 3000)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    assert httpx.get(server.url + "/health").status_code == 200      # alive, but
    assert httpx.get(server.url + "/ready").status_code == 503       # not ready
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    refused = complete(server)
    assert refused.status_code == 503 and "Retry-After" in refused.headers
    thread.join(300)
    assert out["lines"][-1] == "data: [DONE]" and '"finish_reason":"length"' in out["lines"][-2]
    assert server.process.wait(10) == 0


def test_drain_timeout_sends_abort_frames(make_server):
    server = make_server("--drain-timeout", "0.3")
    thread, out = start_stream(server, 100000)
    server.process.send_signal(signal.SIGTERM)
    thread.join(20)
    assert json.loads(out["lines"][-2][6:])["error"]["code"] == "unavailable" and out["lines"][-1] == "data: [DONE]"
    assert server.process.wait(10) == 0


def test_second_signal_ends_at_once(make_server):
    server = make_server("--drain-timeout", "600")
    body = json.dumps({"prompt": "x", "max_tokens": 100000, "ignore_eos": True})
    threading.Thread(target=lambda: subprocess.run(
        ["curl", "-s", server.url + "/v1/completions", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, check=False)).start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert server.alive()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(5) == 130


@pytest.mark.parametrize("flags, words", [
    (["--htp-port", "1"], ["--htp-port", "--http-port"]), (["--http-port", "70000"], ["--http-port", "70000"]),
    (["--threads", "many"], ["--threads", "many"]), (["--model", "/nowhere"], ["--model", "/nowhere"]),
    (["--isa", "mmx"], ["--isa", "mmx", "avx2"]), (["--tls-cert", "x"], ["--tls-key"]), (["--config", "/nowhere"], ["/nowhere"]),
    (["--api-key-file", "/nowhere"], ["/nowhere"]), (["stray"], ["stray"]), (["--port"], ["--port", "value"])])
def test_start_errors_say_what_to_do(flags, words):
    result = subprocess.run([BINARY, "serve", *flags], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode != 0
    for word in words:
        assert word in result.stderr


def test_port_in_use(server, make_server):
    for flag, port in (("--http-port", server.http_port), ("--grpc-port", server.grpc_port)):
        with pytest.raises(RuntimeError) as error:
            make_server(flag, str(port))
        assert str(port) in str(error.value) and flag in str(error.value)
