"""server/turns.py: the engine computes alone, readers together between its turns, and neither starves the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from diffusion_gemma_asr.server.turns import Turns

PATIENCE_S = 20.0


class Crowd:
    """Readers and an engine that take turns; counts who computes at once."""

    def __init__(self, turns: Turns):
        self.turns, self.lock, self.stop = turns, threading.Lock(), threading.Event()
        self.reading = self.engine = 0
        self.most_reading = self.pieces = self.turns_made = self.both = 0

    def read(self) -> None:
        while not self.stop.is_set():
            with self.turns.computing():
                with self.lock:
                    self.reading += 1
                    self.most_reading = max(self.most_reading, self.reading)
                    self.both += self.engine > 0
                time.sleep(0.001)
                with self.lock:
                    self.reading -= 1
                    self.pieces += 1

    def step(self) -> None:
        while not self.stop.is_set():
            with self.turns.engine():
                with self.lock:
                    self.engine += 1
                    self.both += self.reading > 0
                time.sleep(0.001)
                with self.lock:
                    self.engine -= 1
                    self.turns_made += 1

    def run(self, until: Callable[[], bool]) -> None:
        threads = [threading.Thread(target=self.read) for _ in range(4)] + [threading.Thread(target=self.step)]
        for thread in threads:
            thread.start()
        ends = time.monotonic() + PATIENCE_S
        while not until() and time.monotonic() < ends:
            time.sleep(0.005)
        self.stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert until()


def test_engine_and_readers_compute_in_turn_and_all_come_to_it() -> None:
    crowd = Crowd(Turns(2, lambda: 0.01))
    crowd.run(lambda: crowd.turns_made > 20 and crowd.pieces > 20)
    assert crowd.both == 0 and crowd.most_reading == 2


def test_an_engine_that_leaves_no_time_still_lets_readers_in() -> None:
    """Readers that wait when the engine's turn ends begin before its next one."""
    crowd = Crowd(Turns(1, lambda: 0.0))
    crowd.run(lambda: crowd.turns_made > 20 and crowd.pieces > 5)
    assert crowd.both == 0 and crowd.most_reading == 1


def test_on_a_gpu_nobody_waits() -> None:
    turns = Turns(None, lambda: pytest.fail("asked"))
    with turns.engine(), turns.computing(), turns.computing():
        pass


def test_the_engine_goes_on_as_soon_as_what_it_waits_for_is_read() -> None:
    wanted = threading.Event()
    turns = Turns(2, lambda: 0.0 if wanted.is_set() else PATIENCE_S)
    entered = threading.Event()

    def engine() -> None:
        with turns.engine():
            entered.set()

    thread = threading.Thread(target=engine)
    thread.start()
    assert not entered.wait(0.1)
    wanted.set()
    turns.read()
    assert entered.wait(PATIENCE_S / 2)
    thread.join()
