"""Two API keys: one floods, the other sends one request after another. Counted, not timed."""
import threading
import time

import grpc
import httpx
import pytest

SLOTS, QUEUE, CLIENTS, TRICKLE = 4, 16, 16, 12
BODY = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


class Flood:
    """Many clients with one key and the best priority, half REST, half gRPC, each always with a request on its way."""

    def __init__(self, server, stubs, key):
        self.served, self.refused, self.errors = 0, 0, []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.server, (self.pb, self.pb_grpc), self.key = server, stubs, key
        self.threads = [threading.Thread(target=self._run, args=(target,)) for target in [self._rest, self._rpc] * (CLIENTS // 2)]
        for thread in self.threads:
            thread.start()

    def _run(self, client):
        try:
            client()
        except Exception as error:  # pylint: disable=broad-except
            self.errors.append(repr(error))

    def _count(self, served):
        with self.lock:
            self.served += served
            self.refused += not served
        if not served:
            time.sleep(0.02)

    def _rest(self):
        with httpx.Client(headers={"Authorization": f"Bearer {self.key}"}, timeout=120) as client:
            while not self.stopping.is_set():
                answer = client.post(self.server.url + "/v1/completions", json={**BODY, "priority": -100000})
                assert answer.status_code in (200, 429), answer.text
                assert answer.status_code == 200 or int(answer.headers["Retry-After"]) >= 1
                self._count(answer.status_code == 200)

    def _rpc(self):
        with grpc.insecure_channel(self.server.grpc_address) as channel:
            stub = self.pb_grpc.LinSpecStub(channel)
            while not self.stopping.is_set():
                try:
                    list(stub.Generate(generate_request(self.pb, -100000), metadata=metadata(self.key), timeout=120))
                    self._count(True)
                except grpc.RpcError as error:
                    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
                    self._count(False)

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        assert not self.errors


def metadata(key):
    return (("authorization", f"Bearer {key}"),)


def generate_request(pb, priority):
    return pb.GenerateRequest(text=BODY["prompt"], priority=priority, sampling=pb.SamplingParameters(temperature=0),
                              stopping=pb.StoppingParameters(max_tokens=BODY["max_tokens"], ignore_eos=True))


@pytest.fixture(scope="module")
def flooded(make_server, stubs, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("flood\ntrickle\n")
    server = make_server("--api-key-file", str(keys), "--max-requests", str(SLOTS), "--max-queue-requests", str(QUEUE),
                         "--speculation", "off")
    flood = Flood(server, stubs, "flood")
    deadline = time.time() + 60
    while flood.refused < 10 and time.time() < deadline:      # it has all it can get
        time.sleep(0.02)
    yield server, flood
    flood.stop()
    server.wait_idle()


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_flood_does_not_starve_another_key(flooded, stubs, protocol):
    server, flood = flooded
    pb, pb_grpc = stubs
    refused_before = flood.refused
    overtaken = []      # how many of the flood's requests were served while one of ours was on its way
    with httpx.Client(headers={"Authorization": "Bearer trickle"}, timeout=120) as client, \
            grpc.insecure_channel(server.grpc_address) as channel:
        stub = pb_grpc.LinSpecStub(channel)
        for _ in range(TRICKLE):        # none of which is refused
            before = flood.served
            if protocol == "rest":
                answer = client.post(server.url + "/v1/completions", json={**BODY, "priority": 100000})
                assert answer.status_code == 200, answer.text
            else:
                list(stub.Generate(generate_request(pb, 100000), metadata=metadata("trickle"), timeout=120))
            overtaken.append(flood.served - before)
    # One slot stays free for us, so ours runs at once, as long as those beside it: no more than a few of the flood's
    # end in that time, whereas a place behind its queue would let QUEUE - SLOTS of them pass first.
    assert sorted(overtaken)[TRICKLE // 2] <= 2 * SLOTS, overtaken
    assert sum(overtaken) < TRICKLE * (QUEUE - SLOTS), overtaken
    assert flood.refused > refused_before and not flood.errors
