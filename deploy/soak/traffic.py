"""Many clients at once, and what happens to their server meanwhile."""
import collections
import http.client
import random
import signal
import threading
import time

import grpc

from answers import REQUESTS, Answers
from rest_client import RestClient
from rpc_client import RpcClient

WORKERS = 14


class Gate:
    """Workers pass while it is open; close() returns once none is inside."""

    def __init__(self):
        self.condition, self.inside, self.is_open = threading.Condition(), 0, True

    def __enter__(self):
        with self.condition:
            self.condition.wait_for(lambda: self.is_open)
            self.inside += 1

    def __exit__(self, *_):
        with self.condition:
            self.inside -= 1
            self.condition.notify_all()

    def close(self):
        with self.condition:
            self.is_open = False
            self.condition.wait_for(lambda: self.inside == 0)

    def open(self):
        with self.condition:
            self.is_open = True
            self.condition.notify_all()


class Traffic:
    def __init__(self, server, seconds, stubs):
        self.server, (self.pb, self.pb_grpc) = server, stubs
        self.answers = Answers(server)
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.counts, self.leaks = collections.Counter(), []
        self.gate, self.lock, self.restarting, self.kills = Gate(), threading.Lock(), threading.Event(), 0
        self.actions = []

    def work(self, seed):
        rng = random.Random(seed)
        weights, actions = zip(*self.actions)
        while time.monotonic() < self.end:
            with self.gate:
                restarting, kills = self.restarting.is_set(), self.kills
                try:
                    what = rng.choices(actions, weights)[0](rng, rng.randrange(len(REQUESTS)))
                    with self.lock:
                        self.counts[what] += 1
                    if what == "refused":
                        time.sleep(0.1)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    # A kill in mid-answer breaks connections; nothing else may. A slow reader may notice when the next life is up.
                    if not restarting and kills == self.kills:
                        self.answers.report("connection", type(error).__name__, str(error))
                    time.sleep(0.2)

    def pause(self):
        """Nothing runs: every slot must be free, and memory comparable."""
        self.gate.close()
        idle_by = time.monotonic() + 20
        while (self.server.metric("linspec_num_requests_running") + self.server.metric("linspec_num_requests_waiting") > 0
               and time.monotonic() < idle_by):
            time.sleep(0.1)
        held = self.server.metric("linspec_state_slots", 'state="running"')
        if held or self.server.metric("linspec_num_requests_waiting"):
            self.leaks.append(held)
        self.server.sample()
        self.counts["pause"] += 1
        self.gate.open()

    def kill_and_restart(self):
        self.restarting.set()
        self.kills += 1
        self.server.process.kill()
        self.server.process.wait()
        self.server.start()
        time.sleep(2)
        self.restarting.clear()
        self.counts["SIGKILL"] += 1

    def disturb(self, prometheus):
        """Main thread. Two kills, at a third and two thirds, so that each life's log is a different trouble."""
        started = time.monotonic()
        kills = [started + self.seconds / 3, started + self.seconds * 2 / 3]
        every = min(60.0, self.seconds / 8)
        stop_at, pause_at, scrape_at = started + every / 3, started + every, started + every / 2
        while (now := time.monotonic()) < self.end:
            time.sleep(0.2)
            if kills and now >= kills[0]:
                kills.pop(0)
                self.kill_and_restart()
                # A start that took long on a busy machine must not eat the life after it.
                self.end = max(self.end, time.monotonic() + (1 + len(kills)) * self.seconds / 3)
                kills = [time.monotonic() + self.seconds / 3] if kills else []
            if now >= stop_at:
                stop_at = now + every / 3
                self.server.process.send_signal(signal.SIGSTOP)
                time.sleep(0.5)
                self.server.process.send_signal(signal.SIGCONT)
                self.counts["SIGSTOP"] += 1
            if now >= scrape_at:
                scrape_at = now + 2 * every
                self.counts["Prometheus killed"] += prometheus.restart()
            if now >= pause_at:
                pause_at = now + every
                self.pause()

    def run(self, prometheus):
        backoff = [(f"grpc.{what}_reconnect_backoff_ms", 200) for what in ("initial", "min", "max")]
        with grpc.insecure_channel(f"127.0.0.1:{self.server.grpc_port}", options=backoff) as channel:
            self.actions = (RestClient(self.server, self.answers).actions +
                            RpcClient(self.pb_grpc.LinSpecStub(channel), self.pb, self.answers).actions)
            threads = [threading.Thread(target=self.work, args=(seed,)) for seed in range(WORKERS)]
            for thread in threads:
                thread.start()
            self.disturb(prometheus)
            for thread in threads:
                thread.join()
        self.pause()
