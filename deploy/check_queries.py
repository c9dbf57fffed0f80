#!/usr/bin/env python3
"""Runs every expression of the rules and dashboards against a real Prometheus that scrapes a real server under load.

usage: deploy/check_queries.py LINSPEC_BINARY [flags of `linspec serve`]      needs prometheus; only 127.0.0.1 is used
"""
import json
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

HERE = pathlib.Path(__file__).parent
# Silent on a healthy server: nothing was turned away, nothing failed.
MAY_BE_EMPTY = re.compile(r"linspec_admission_rejected_total")


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
    http, grpc, prometheus_port = free_port(), free_port(), free_port()
    base = f"http://127.0.0.1:{prometheus_port}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        (folder / "rules.yml").write_text((HERE / "prometheus/rules.yml").read_text())
        config = (HERE / "prometheus/prometheus.yml").read_text()
        config = config.replace("linspec:8000", f"127.0.0.1:{http}").replace("5s", "1s").replace("15s", "1s")
        (folder / "prometheus.yml").write_text(config)
        processes = [
            subprocess.Popen([binary, "serve", "--http-port", str(http), "--grpc-port", str(grpc), *flags],
                             stdout=subprocess.DEVNULL),
            subprocess.Popen(["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                              f"--web.listen-address=127.0.0.1:{prometheus_port}", "--log.level=error"])]
        try:
            wait_for(f"http://127.0.0.1:{http}/ready")
            wait_for(f"{base}/-/ready")
            # Repetition in the prompts gives the n-gram drafter something to draft.
            subprocess.run([binary, "loadtest", "--port", str(http), "--num-prompts", "1000000", "--max-concurrency", "4",
                            "--duration", "12", "--random-output-len", "64", "--ignore-eos", "--quiet"], check=True)
            bad = [name for name, expression in expressions()
                   if not query(base, expression) and not MAY_BE_EMPTY.search(expression)]
            with urllib.request.urlopen(f"{base}/api/v1/rules", timeout=10) as reply:
                rules = [rule for group in json.load(reply)["data"]["groups"] for rule in group["rules"]]
            bad += [rule["name"] for rule in rules if rule["health"] != "ok"]
            bad += [rule["name"] for rule in rules if rule["type"] == "recording" and not query(base, rule["name"])]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(30)
    for name in bad:
        print(f"no data: {name}", file=sys.stderr)
    print(f"{sum(1 for _ in expressions())} panels' expressions and {len(rules)} rules, {len(bad)} without data")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
