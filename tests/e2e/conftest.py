"""A real server binary and real clients.

The binary is $LINSPEC_BINARY (default build/cpu/linspec), the model $LINSPEC_MODEL (default: the bundled one). Ports are
free ones; every server listens on 127.0.0.1 only.
"""
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import grpc
import httpx
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("LINSPEC_BINARY", ROOT / "build/cpu/linspec"))


class Server:
    """One `linspec serve` process."""

    def __init__(self, log_path, *flags):
        self.log_path = log_path
        command = [str(BINARY), "serve", "--http-port", "0", "--grpc-port", "0", "--threads", "2", *flags]
        if os.environ.get("LINSPEC_MODEL") and "--model" not in flags:
            command += ["--model", os.environ["LINSPEC_MODEL"]]
        if os.environ.get("LINSPEC_DRAFT_MODEL") and "--draft-model" not in flags:
            command += ["--draft-model", os.environ["LINSPEC_DRAFT_MODEL"]]
        with open(log_path, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        self.http_port = int(self._wait_for(r"^REST\s+https?://127\.0\.0\.1:(\d+)$|\"http_port\":(\d+)"))
        self.grpc_port = int(self._wait_for(r"^gRPC\s+127\.0\.0\.1:(\d+)$|\"grpc_port\":(\d+)"))
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.grpc_address = f"127.0.0.1:{self.grpc_port}"

    def _wait_for(self, pattern, timeout=60):
        deadline = time.time() + timeout
        while time.time() < deadline:
            found = re.search(pattern, self.log(), re.M)
            if found:
                return found[found.lastindex]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"server did not start:\n{self.log()}")

    def log(self):
        return pathlib.Path(self.log_path).read_text(errors="replace")

    def alive(self):
        return self.process.poll() is None

    def metric(self, name):
        """Sum of all samples whose line starts with name."""
        text = httpx.get(self.url + "/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    def wait_idle(self, timeout=10):
        """Every slot free again: nothing leaked."""
        deadline = time.time() + timeout
        while time.time() < deadline:
            if self._slots("running") == 0 and self.metric("linspec_num_requests_waiting") == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"slots leaked: {self._slots('running')} still held")

    def _slots(self, state):
        text = httpx.get(self.url + "/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("linspec_state_slots{") and f'state="{state}"' in line]
        assert len(lines) == 1
        return float(lines[0].rsplit(" ", 1)[1])

    def stop(self):
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    """Client generated from the proto alone."""
    from grpc_tools import protoc
    out = tmp_path_factory.mktemp("stubs")
    status = protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}",
                          str(ROOT / "proto/linspec/v1/linspec.proto")])
    assert status == 0
    sys.path.insert(0, str(out))
    from linspec.v1 import linspec_pb2, linspec_pb2_grpc
    return linspec_pb2, linspec_pb2_grpc


@pytest.fixture(scope="session")
def make_server(tmp_path_factory):
    servers = []

    def make(*flags):
        server = Server(str(tmp_path_factory.mktemp("server") / "log"), *flags)
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()
    # A leak is reported at the end of the process, a report on a thread may outlive the test that caused it.
    reports = [server.log() for server in servers if re.search(r"Sanitizer|runtime error: ", server.log())]
    assert not reports, "\n".join(reports)


@pytest.fixture(scope="session")
def server(make_server):
    return make_server("--max-requests", "8", "--header-timeout", "2")


@pytest.fixture(scope="session")
def stub(server, stubs):
    return stubs[1].LinSpecStub(grpc.insecure_channel(server.grpc_address))


@pytest.fixture(scope="session")
def model(server):
    return httpx.get(server.url + "/v1/models").json()["data"][0]["id"]


@pytest.fixture(scope="session")
def has_chat(server):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    return httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).status_code == 200


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder with ca.pem, and server.pem, server.key, client.pem, client.key signed by it."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca")
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-out", f"{name}.pem", "-extfile", "san")
    return folder


def complete(server, **fields):
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "ignore_eos": True, **fields}
    return httpx.post(server.url + "/v1/completions", json=body, timeout=60)
