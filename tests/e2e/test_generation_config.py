"""What requests get that do not say: the model's generation_config.json, over REST and gRPC."""
import json
import os
import pathlib
import shutil

import httpx
import pytest

from conftest import ROOT

FOLDER = pathlib.Path(os.environ.get("LINSPEC_MODEL", ROOT / "models/bundled/target"))
SAYS = json.loads((FOLDER / "generation_config.json").read_text())


def complete(server, **fields):
    body = {"prompt": "It was late in the evening when", "max_tokens": 24, "seed": 5, "return_token_ids": True, **fields}
    response = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def params(server):
    return httpx.get(server.url + "/props").json()["default_generation_settings"]["params"]


def grpc_tokens(stub, stubs, **sampling):
    pb = stubs[0]
    request = pb.GenerateRequest(text="It was late in the evening when", sampling=pb.SamplingParameters(seed=5, **sampling),
                                 stopping=pb.StoppingParameters(max_tokens=24), response=pb.ResponseParameters(token_ids=True))
    return [token for message in stub.Generate(request) for token in message.token_ids]


def test_the_file_speaks_where_the_request_does_not(server, stub, stubs):
    said = {"temperature": SAYS["temperature"], "top_p": SAYS["top_p"]}
    unsaid = complete(server)["token_ids"]
    assert unsaid == complete(server, **said)["token_ids"]
    assert unsaid != complete(server, temperature=1, top_p=1)["token_ids"]
    assert grpc_tokens(stub, stubs) == unsaid
    told = params(server)
    assert told["temperature"] == pytest.approx(said["temperature"]) and told["top_p"] == pytest.approx(said["top_p"])
    defaults = stub.GetModel(stubs[0].GetModelRequest())
    assert defaults.default_sampling.temperature == pytest.approx(said["temperature"])
    assert defaults.default_sampling.top_p == pytest.approx(said["top_p"])
    assert defaults.default_chat_tokens == SAYS["max_new_tokens"]


def test_the_request_wins(server, stub, stubs):
    greedy = complete(server, temperature=0, seed=1)["token_ids"]
    assert greedy == complete(server, temperature=0, seed=2)["token_ids"]
    assert grpc_tokens(stub, stubs, temperature=0) == greedy


def test_a_chat_ends_at_max_new_tokens(server, has_chat):
    if not has_chat:
        pytest.skip("the model has no chat template")
    body = {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == SAYS["max_new_tokens"]
    body["max_tokens"] = SAYS["max_new_tokens"] + 1
    answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120).json()
    assert answer["usage"]["completion_tokens"] == SAYS["max_new_tokens"] + 1


def test_none_leaves_openais_defaults(make_server, stubs):
    import grpc
    server = make_server("--generation-config", "none", "--speculation", "off")
    assert params(server)["temperature"] == 1 and params(server)["top_p"] == 1
    assert complete(server)["token_ids"] == complete(server, temperature=1, top_p=1)["token_ids"]
    stub = stubs[1].LinSpecStub(grpc.insecure_channel(server.grpc_address))
    assert stub.GetModel(stubs[0].GetModelRequest()).default_chat_tokens == 1024
    server.stop()


def test_its_end_tokens_end(make_server, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tests/data/tiny/full", folder)
    shutil.copy(ROOT / "models/bundled/target/tokenizer.json", folder / "tokenizer.json")

    def choices(*ignore_eos):
        server = make_server("--model", str(folder))
        answers = [complete(server, prompt=[1, 2, 3], temperature=0, max_tokens=16, ignore_eos=ignore) for ignore in ignore_eos]
        server.stop()
        return answers

    plain = choices(True)[0]["token_ids"]
    end = next(token for token in plain[1:] if token != plain[0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    ended, ignored = choices(False, True)
    at = plain.index(end)
    assert ended["token_ids"] == plain[:at + 1] and ended["finish_reason"] == "stop" and ended["stop_reason"] is None
    assert ignored["token_ids"] == plain
