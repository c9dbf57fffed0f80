#!/usr/bin/env python3
"""Runs every expression of the rules and dashboards against a real Prometheus that scrapes a real server under load, and the
queries of vLLM's own dashboard against --metrics-alias vllm. The GPU dashboard is asked about a stand-in with the names that
tests/server/metrics_test.cc holds the server to.

usage: deploy/check_queries.py LINSPEC_BINARY [flags of `linspec serve`]      needs prometheus; only 127.0.0.1 is used
"""
import http.server
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

HERE = pathlib.Path(__file__).parent
# As the Grafana dashboard of vLLM asks.
VLLM_QUERIES = [
    "histogram_quantile(0.99, sum by(le) (rate(vllm:e2e_request_latency_seconds_bucket[5s])))",
    "rate(vllm:e2e_request_latency_seconds_sum[5s]) / rate(vllm:e2e_request_latency_seconds_count[5s])",
    "rate(vllm:prompt_tokens_total[5s])", "rate(vllm:generation_tokens_total[5s])",
    "histogram_quantile(0.95, sum by(le) (rate(vllm:request_time_per_output_token_seconds_bucket[5s])))",
    "histogram_quantile(0.95, sum by(le) (rate(vllm:inter_token_latency_seconds_bucket[5s])))",
    "histogram_quantile(0.9, sum by(le) (rate(vllm:time_to_first_token_seconds_bucket[5s])))",
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "sum by(le) (increase(vllm:request_prompt_tokens_bucket[5s]))",
    "sum by(le) (increase(vllm:request_generation_tokens_bucket[5s]))",
    "sum by(finished_reason) (increase(vllm:request_success_total[5s]))",
    "rate(vllm:request_queue_time_seconds_sum[5s])", "rate(vllm:request_prefill_time_seconds_sum[5s])",
    "rate(vllm:request_decode_time_seconds_sum[5s])", "rate(vllm:request_max_num_generation_tokens_sum[5s])",
    "rate(vllm:spec_decode_num_accepted_tokens_total[5s]) / rate(vllm:spec_decode_num_draft_tokens_total[5s])",
]


class GpuStandIn(http.server.BaseHTTPRequestHandler):
    """What a server with one GPU would add to /metrics."""

    def do_GET(self):
        seconds = time.monotonic()
        lines = ['linspec_gpu_info{gpu="0",name="stand-in"} 1', f"linspec_generation_tokens_total {1000 * seconds}"]
        lines += [f'linspec_gpu_memory_bytes{{gpu="0",kind="{kind}"}} {value}' for kind, value in
                  (("weights", 4e9), ("states", 2e9), ("scratch", 1e9), ("used", 8e9), ("total", 80e9))]
        lines += [f'linspec_gpu_time_seconds_total{{gpu="0",stage="{stage}"}} {share * seconds}'
                  for stage, share in (("prefill", 0.1), ("draft", 0.1), ("verify", 0.5), ("commit", 0.1))]
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(("\n".join(lines) + "\n").encode())

    def log_message(self, *_):
        pass


class StandInServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Prometheus is ended in mid-scrape; there is nobody to tell."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, seconds=30):
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                return reply.read()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def expressions():
    for path in sorted((HERE / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]


def query(base, expression):
    expression = expression.replace("$__rate_interval", "5s").replace("$instance", ".*")
    url = f"{base}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(url, timeout=10) as reply:
        answer = json.load(reply)
    return answer["data"]["result"] if answer["status"] == "success" else None


def main():
    binary, flags = sys.argv[1], sys.argv[2:]
    http_port, grpc, prometheus_port = free_port(), free_port(), free_port()
    gpu = StandInServer(("127.0.0.1", 0), GpuStandIn)
    threading.Thread(target=gpu.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{prometheus_port}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        (folder / "rules.yml").write_text((HERE / "prometheus/rules.yml").read_text())
        config = (HERE / "prometheus/prometheus.yml").read_text()
        config = config.replace("15s", "1s").replace("5s", "1s")
        config = config.replace('"linspec:8000"', f'"127.0.0.1:{http_port}", "127.0.0.1:{gpu.server_port}"')
        (folder / "prometheus.yml").write_text(config)
        processes = [
            subprocess.Popen([binary, "serve", "--http-port", str(http_port), "--grpc-port", str(grpc),
                              "--metrics-alias", "vllm", "--log-level", "off", *flags],
                             stdout=subprocess.DEVNULL),
            subprocess.Popen(["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                              f"--web.listen-address=127.0.0.1:{prometheus_port}", "--log.level=error"])]
        try:
            wait_for(f"http://127.0.0.1:{http_port}/ready")
            wait_for(f"{base}/-/ready")
            # Half over each protocol. Repetition in the prompts gives the n-gram drafter something to draft.
            load = [binary, "loadtest", "--num-prompts", "1000000", "--max-concurrency", "2", "--duration", "12",
                    "--random-output-len", "64", "--ignore-eos", "--quiet"]
            rpcs = subprocess.Popen([*load, "--backend", "grpc", "--port", str(grpc), "--metrics-port", str(http_port)],
                                    stdout=subprocess.DEVNULL)
            subprocess.run([*load, "--port", str(http_port)], check=True, stdout=subprocess.DEVNULL)
            if rpcs.wait() != 0:
                sys.exit("check_queries: the load over gRPC failed")
            bad = [name for name, expression in expressions() if not query(base, expression)]
            bad += [expression for expression in VLLM_QUERIES if not query(base, expression)]
            with urllib.request.urlopen(f"{base}/api/v1/rules", timeout=10) as reply:
                rules = [rule for group in json.load(reply)["data"]["groups"] for rule in group["rules"]]
            bad += [rule["name"] for rule in rules if rule["health"] != "ok"]
            bad += [rule["name"] for rule in rules if rule["type"] == "recording" and not query(base, rule["name"])]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
            gpu.shutdown()
    for name in bad:
        print(f"no data: {name}", file=sys.stderr)
    print(f"{sum(1 for _ in expressions())} panels' expressions, {len(VLLM_QUERIES)} queries of vLLM's dashboard and {len(rules)} rules, {len(bad)} without data")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
