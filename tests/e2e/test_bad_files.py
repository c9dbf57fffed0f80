"""Bad input that comes before any request: model files, heads, keys, disks, signals. `linspec serve` must end with status
1 or 2 and a message that names what is wrong, never by a signal."""
import json
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import time

import httpx
import pytest

from conftest import BINARY, ROOT

TINY = ROOT / "tests/data/tiny/full"
TOKENIZER = ROOT / "models/bundled/target/tokenizer.json"


def write_tensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def edit_tensors(change):
    """Applies change(header) to the header of the model's file."""
    def edit(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:8 + size])
        change(header)
        write_tensors(path, header, raw[8 + size:])
    return edit


def edit_json(name, **fields):
    def edit(folder):
        path = folder / name
        document = json.loads(path.read_text())
        for key, value in fields.items():
            where = document
            *parents, last = key.split("__")
            for parent in parents:
                where = where[parent]
            where[last] = value
        path.write_text(json.dumps(document))
    return edit


def first(header):
    return header[next(name for name in header if name != "__metadata__")]


def replace(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def index(weight_map):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return edit


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def use_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def link_to_itself(name):
    def edit(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)
    return edit


BAD_MODELS = {
    "header longer than the file": (replace("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "model.safetensors"),
    "empty file": (replace("model.safetensors", b""), "model.safetensors"),
    "header is no JSON": (lambda folder: write_tensors(folder / "model.safetensors", b"{" * 1000), "model.safetensors"),
    "negative offset": (edit_tensors(lambda header: first(header).update(data_offsets=[-4, 0])), "model.safetensors"),
    "reversed offsets": (edit_tensors(lambda header: first(header)["data_offsets"].reverse()), "model.safetensors"),
    "offsets past the end": (edit_tensors(lambda header: first(header).update(data_offsets=[2**60, 2**60 + 4])), "model.safetensors"),
    "shape whose product overflows": (edit_tensors(lambda header: first(header).update(shape=[2**32, 2**32, 2**32])), "model.safetensors"),
    "unknown dtype": (edit_tensors(lambda header: first(header).update(dtype="Q9")), "model.safetensors"),
    "wrong shape": (edit_tensors(lambda header: first(header).update(shape=[1] + first(header)["shape"])), "shape"),
    "missing tensor": (edit_tensors(lambda header: header.pop(next(n for n in header if n != "__metadata__"))), "tensor"),
    "truncated": (truncate, "model.safetensors"),
    "pickle": (use_pickle, "model.safetensors"),
    "index outside the folder": (index({"model.embed_tokens.weight": "../../../../etc/passwd"}), ".."),
    "index to an absolute path": (index({"model.embed_tokens.weight": "/etc/passwd"}), "/etc/passwd"),
    "no heads": (edit_json("config.json", num_attention_heads=0), "num_attention_heads"),
    "negative layers": (edit_json("config.json", num_hidden_layers=-1), "num_hidden_layers"),
    "huge vocabulary": (edit_json("config.json", vocab_size=2**62), "vocab_size"),
    "config is no JSON": (replace("config.json", b"\x00" * 100), "config.json"),
    "deep config": (replace("config.json", b'{"a":' * 10**5), "config.json"),
    "sampling default of the wrong type": (replace("generation_config.json", b'{"temperature": "hot"}'),
                                           'generation_config.json: config field temperature = "hot"'),
    "sampling default out of range": (replace("generation_config.json", b'{"top_p": 0}'), "generation_config.json: config field top_p"),
    "generation config is no JSON": (replace("generation_config.json", b"[" * 10**5), "generation_config.json"),
    "tokenizer is no JSON": (replace("tokenizer.json", b"[1,2"), "tokenizer.json"),
    "tokenizer without a model": (replace("tokenizer.json", b"{}"), "tokenizer.json"),
    "merges of unknown tokens": (edit_json("tokenizer.json", model__merges=[["\u0000none", "\u0000such"]] * 3), "tokenizer.json"),
    **{f"{name} is a link to itself": (link_to_itself(name), name) for name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors", "medusa_config.json", "recurrent_head_config.json")},
    "endless template": (replace("chat_template.jinja", b"{% for i in range(10) %}"), "chat_template.jinja"),
}


def serve(*flags, **more):
    return subprocess.run([BINARY, "serve", "--http-port", "0", "--grpc-port", "0", *map(str, flags)], capture_output=True,
                          text=True, timeout=60, check=False, **more)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("name", BAD_MODELS)
def test_14_model_files(model_folder, name):
    edit, word = BAD_MODELS[name]
    edit(model_folder)
    result = serve("--model", model_folder)
    assert result.returncode in (1, 2) and word in result.stderr, (result.returncode, result.stderr[-500:])


@pytest.mark.parametrize("flag", ["--model", "--draft-model"])
def test_14_path_too_long(flag):
    result = serve(flag, "x" * 5000)
    assert result.returncode in (1, 2) and flag in result.stderr, (result.returncode, result.stderr[-500:])


def test_16_draft_of_another_vocabulary(model_folder):
    result = serve("--draft-model", model_folder)
    assert result.returncode == 2 and "--draft-model" in result.stderr and "vocab" in result.stderr, result.stderr


def test_17_full_disk_under_the_log():
    """Nothing can be written to stdout or stderr: the server serves all the same."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]   # free a moment ago; the server cannot tell us one
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([BINARY, "serve", "--http-port", str(port), "--grpc-port", "-1"], stdout=full, stderr=full)
        try:
            deadline = time.time() + 60
            while time.time() < deadline and process.poll() is None:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            body = {"prompt": "x", "max_tokens": 4}
            assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_17_signal_while_loading(name):
    process = subprocess.Popen([BINARY, "serve", "--http-port", "0", "--grpc-port", "0"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline().startswith("linspec ")   # printed before the model is read
    number = getattr(signal, name)
    process.send_signal(number)
    assert process.wait(30) in (128 + number, 0)   # 0: loading was over already, and nothing was running
    process.stdout.close()
