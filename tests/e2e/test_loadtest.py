"""The load tester against the real server, in the clear and over (mutual) TLS."""
import json
import subprocess

import pytest

from conftest import BINARY


def loadtest(folder, *flags):
    """Exit status, standard error, and the figures if there are any."""
    file = folder / "result.json"
    file.unlink(missing_ok=True)
    result = subprocess.run([BINARY, "loadtest", "--quiet", "--num-prompts", "12", "--random-input-len", "8", "--random-output-len", "5",
                             "--ignore-eos", "--result-filename", file, *flags], capture_output=True, text=True, timeout=120, check=False)
    return result.returncode, result.stderr, json.loads(file.read_text()) if file.exists() else None


def address(server, backend):
    return ["--backend", backend, "--port", str(server.grpc_port if backend == "grpc" else server.http_port),
            "--metrics-port", str(server.http_port)]


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "grpc"])
def test_every_backend(server, tmp_path, backend, has_chat):
    if backend == "openai-chat" and not has_chat:
        pytest.skip("the model has no chat template")
    status, errors, figures = loadtest(tmp_path, *address(server, backend))
    assert status == 0, errors
    assert figures["completed"] == 12 and figures["failed"] == 0 and figures["total_output_tokens"] == 60


@pytest.fixture(scope="module")
def secure(make_server, certificates):
    path = str(certificates)
    return make_server("--tls-cert", path + "/server.pem", "--tls-key", path + "/server.key", "--tls-client-ca", path + "/ca.pem")


@pytest.mark.parametrize("backend", ["openai", "grpc"])
def test_mutual_tls(secure, certificates, tmp_path, backend):
    trust = ["--tls-ca", certificates / "ca.pem"]
    ours = ["--tls-cert", certificates / "client.pem", "--tls-key", certificates / "client.key"]
    status, errors, figures = loadtest(tmp_path, *address(secure, backend), *trust, *ours)
    assert status == 0, errors
    assert figures["completed"] == 12 and figures["total_output_tokens"] == 60

    # The model is named, so that the first thing to fail is the backend itself. Nobody without a certificate gets in, and
    # a server that nobody known has signed is not spoken to.
    named = [*address(secure, backend), "--model", figures["model_id"], "--num-warmups", "0", "--timeout", "20"]
    stranger = certificates / "client.pem"
    for flags in (trust, ["--tls-ca", stranger, *ours], ["--tls"]):
        status, errors, figures = loadtest(tmp_path, *named, *flags)
        assert status == 1 and figures["completed"] == 0 and figures["failed"] == 12, flags


def test_https_base_url(secure, certificates, tmp_path):
    flags = ["--base-url", f"https://127.0.0.1:{secure.http_port}", "--tls-ca", certificates / "ca.pem",
             "--tls-cert", certificates / "client.pem", "--tls-key", certificates / "client.key"]
    status, errors, figures = loadtest(tmp_path, *flags)
    assert status == 0 and figures["completed"] == 12, errors


@pytest.mark.parametrize("flags, words", [
    (["--tls-ca", "/nowhere/ca.pem"], ["--tls-ca", "/nowhere/ca.pem"]), (["--tls-cert", "/dev/null"], ["--tls-cert", "--tls-key"]),
    (["--tls-ca", "/dev/null", "--tls-cert", "/dev/null", "--tls-key", "/dev/null"], ["--tls-"]),
    (["--base-url", "ftp://x"], ["--base-url", "https://"])])
def test_bad_flags_are_named(tmp_path, flags, words):
    status, errors, figures = loadtest(tmp_path, *flags)
    assert status in (1, 2) and figures is None
    for word in words:
        assert word in errors
