"""One firewall, many callers."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from alknet_firewall import AlarmLevel, Firewall, InputError
from tiny_detector import ATTACK, BENIGN, ORDER, ordinary_sentences

TEXTS = [*BENIGN, ATTACK, ORDER, " ".join(ordinary_sentences(30)), "", *ordinary_sentences(20)]


@pytest.fixture(scope="module")
def expected(tiny):
    return [tiny.screen(text) for text in TEXTS]


def test_sixteen_threads_share_one_firewall(tiny, expected):
    start = threading.Barrier(16)

    def work(offset: int) -> None:
        start.wait()
        for i in range(len(TEXTS)):
            at = (i + offset) % len(TEXTS)
            assert tiny.screen(TEXTS[at]) == expected[at]

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(work, offset) for offset in range(16)]:
            future.result()


def test_threads_with_batches_streams_and_errors_among_them(tiny, expected):
    def batch() -> None:
        assert tiny.screen_batch(TEXTS) == expected

    def stream() -> None:
        for text, alarm in zip(TEXTS, expected, strict=True):
            with tiny.stream() as piecewise:
                for start in range(0, len(text), 13):
                    piecewise.feed(text[start : start + 13])
            assert piecewise.alarm == alarm

    def errors() -> None:
        for _ in range(50):
            with pytest.raises(InputError):
                tiny.screen("\ud800")

    with ThreadPoolExecutor(9) as pool:
        for future in [pool.submit(work) for work in (batch, stream, errors) * 3]:
            future.result()


def test_threads_may_load_at_once(tiny_folder, expected):
    def work(_: int) -> None:
        assert Firewall(tiny_folder, threads=2).screen(TEXTS[0]) == expected[0]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_a_gathering_of_coroutines(tiny, expected):
    async def work() -> list:
        return await asyncio.gather(*(tiny.ascreen(text) for text in TEXTS))

    assert asyncio.run(work()) == expected


def test_ascreen_takes_an_origin_and_raises(tiny):
    async def work() -> None:
        assert (await tiny.ascreen(ORDER, origin="user")).level is AlarmLevel.CLEAR
        with pytest.raises(InputError):
            await tiny.ascreen(b"bytes")

    asyncio.run(work())


def test_the_event_loop_goes_on_meanwhile(tiny):
    """Between the start and the end of one screening, other coroutines run many times."""
    text = BENIGN[0] * 500
    turns = 0

    async def work() -> int:
        nonlocal turns
        screening = asyncio.create_task(tiny.ascreen(text))
        while not screening.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(work()) > 10


def test_the_gil_is_released(tiny):
    """Another thread runs while this one is inside one call.

    With a switch interval that never ends, a thread that waits for the GIL gets it only from a
    thread that lets go of it by itself.
    """
    text = BENIGN[0] * 500
    running = threading.Event()
    inside = threading.Event()
    progress = 0

    def count() -> None:
        nonlocal progress
        running.set()
        inside.wait()
        while not done:
            progress += 1
            time.sleep(0)

    done = False
    thread = threading.Thread(target=count)
    thread.start()
    running.wait()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        inside.set()
        before = progress
        tiny.screen(text)
        after = progress
    finally:
        done = True
        sys.setswitchinterval(interval)
    thread.join()
    assert after > before
