#!/usr/bin/env python3
"""What the server adds to the age of a token: linspec beside plain send(), Boost.Beast and gRPC with the same streams, in turns. Each
round runs all of them one after the other; differences are taken within a round, and the medians over the rounds are printed, with the
lowest and the highest.

usage: tests/front_door/compare.py BENCH_FRONT_DOOR [ROUNDS] [STREAMS] [PACE_US]
"""
import re
import statistics
import subprocess
import sys

CASES = {"send() alone": ["--server", "socket"], "Beast alone": ["--server", "beast"], "REST": [],
         "gRPC alone": ["--server", "grpc"], "gRPC": ["--protocol", "grpc"]}
DIFFERENCES = [("REST", "send() alone"), ("REST", "Beast alone"), ("gRPC", "gRPC alone")]


def run(binary, streams, pace_us, flags):
    text = subprocess.run([binary, "streams", "--streams", streams, "--tokens", "100", "--pace-us", pace_us, *flags], check=True,
                          capture_output=True, text=True).stdout
    tokens = int(re.search(r"(\d+) tokens in", text)[1])
    p50, p90, p99 = map(float, re.search(r"p50 ([\d.]+)  p90 ([\d.]+)  p99 ([\d.]+)", text).groups())
    seconds = float(re.search(r"server: ([\d.]+) s of processor", text)[1])
    return p50, p90, p99, seconds / tokens * 1e6


def row(name, rounds):
    cells = [f"{statistics.median(column):.1f} ({min(column):.1f} to {max(column):.1f})" for column in zip(*rounds)]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    binary, rounds, streams, pace_us = (sys.argv[1:] + ["5", "500", "20000"][len(sys.argv) - 2:])[:4]
    results = {name: [] for name in CASES}
    for _ in range(int(rounds)):
        for name, flags in CASES.items():
            results[name].append(run(binary, streams, pace_us, flags))
    print(f"{streams} streams, a token each every {pace_us} us, medians of {rounds} rounds (lowest to highest)\n")
    print("| server | age p50, ms | p90, ms | p99, ms | processor time a token, us |\n|---|---|---|---|---|")
    for name, measured in results.items():
        row(name, measured)
    for ours, theirs in DIFFERENCES:
        row(f"{ours} less {theirs}", [[a - b for a, b in zip(*pair)] for pair in zip(results[ours], results[theirs])])


if __name__ == "__main__":
    main()
