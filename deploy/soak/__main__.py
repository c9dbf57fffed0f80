"""Mixed traffic with faults against a private server on 127.0.0.1, over REST and gRPC: full answers, streams dropped at every
phase, slow readers, scrapers that do not read, bad input, deadlines, the process stopped and continued, killed and restarted,
a full disk under its log, a log that nobody reads, Prometheus killed.

Every answer that ends is compared with its solo run, every dropped one with the beginning of it. Once a minute the traffic
pauses: no slot may be held, and resident memory must be where it was.

Runs in the environment of tests/e2e/requirements.txt. Ends with 1 when anything was wrong.
"""
import argparse
import pathlib
import signal
import sys
import tempfile

from prometheus import Prometheus
from server import Server
from traffic import Traffic


def memory_is_flat(samples):
    """The last third of the pauses against the first third's highest: what one step or connection needs was needed there."""
    third = len(samples) // 3
    return third < 2 or max(samples[-third:]) <= 1.05 * max(samples[:third]) + 8 * 1024


def find_failures(server, traffic, exit_status, log):
    failures = [f"wrong: {case}" for case in traffic.answers.wrong[:10]]
    failures += [f"slots held in a pause: {held:g}" for held in traffic.leaks]
    failures += [f"memory grew: {life} KiB" for life in server.rss_kib if not memory_is_flat(life)]
    failures += [f"SIGTERM: exit status {exit_status}"] if exit_status else []
    failures += ["a prompt is in the log"] if "harbour" in log else []
    failures += ["the log is empty"] if "request finished" not in log else []
    for life, lost in enumerate(server.lost_lines):
        kind = server.lives[life % len(server.lives)]
        # Every line of a full disk is lost; a pipe takes the first few.
        if lost and (kind == "file" and lost[-1] or kind == "full disk" and not lost[-1]):
            failures.append(f"log to {kind}: {lost[-1]:g} lines lost")
    return failures


def make_stubs(folder):
    from grpc_tools import protoc
    root = pathlib.Path(__file__).resolve().parents[2]
    if protoc.main(["protoc", f"-I{root / 'proto'}", f"--python_out={folder}", f"--grpc_python_out={folder}",
                    str(root / "proto/linspec/v1/linspec.proto")]) != 0:
        sys.exit("soak: protoc failed")
    sys.path.insert(0, str(folder))
    from linspec.v1 import linspec_pb2, linspec_pb2_grpc
    return linspec_pb2, linspec_pb2_grpc


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Other flags go to `linspec serve`, e.g. --device cuda --deterministic true.")
    parser.add_argument("binary", help="the linspec program to start")
    parser.add_argument("minutes", nargs="?", type=float, default=1.0, help="how long the traffic lasts (1)")
    arguments, flags = parser.parse_known_args()
    minutes = arguments.minutes
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        stubs = make_stubs(folder)
        server = Server(arguments.binary, flags, folder)
        prometheus = Prometheus(folder, server.port)
        try:
            traffic = Traffic(server, minutes * 60, stubs)
            traffic.run(prometheus)
            fired = prometheus.fired(minutes * 60)
            server.process.send_signal(signal.SIGTERM)
            status = server.process.wait(60)
        finally:
            prometheus.stop()
            server.process.kill()
        failures = find_failures(server, traffic, status, (folder / "log").read_text())
    print(", ".join(f"{count} {what}" for what, count in sorted(traffic.counts.items())))
    memory = "; ".join(f"{life[0] / 1024:.0f} to {life[-1] / 1024:.0f} MiB" for life in server.rss_kib if life)
    alerts = "no Prometheus here" if fired is None else f"alerts: {', '.join(fired) or 'none'}"
    print(f"{minutes:g} minutes, {len(traffic.answers.wrong)} wrong, {len(traffic.leaks)} pauses with a slot held, memory {memory}, {alerts}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
