"""What a process needs around the training loop: a device, signals, a watchdog, a meeting place, batches."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from nanomoe.config import BadInput
from nanomoe.parallel import (
    DistContext,
    Feed,
    StopRequest,
    Watchdog,
    cpu_has_bfloat16,
    deterministic,
    find_device,
    find_dtype,
    peak_flops,
    process_group,
    rendezvous,
)

CPU = torch.device('cpu')


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: find_device('tpu'), 'device must be auto, cpu, cuda, cuda:N or mps, got tpu'),
        (lambda: find_device('cpu:1'), 'device cpu:1 does not exist: this machine has 1 of that kind'),
        (lambda: find_dtype('float16', CPU), 'dtype must be float32 or bfloat16 on a CPU, got float16'),
    ],
)
def test_settings_that_cannot_work_are_reported(call, message):
    with pytest.raises(BadInput) as refused:
        call()
    assert str(refused.value) == message
    assert find_dtype('auto', CPU) == (torch.bfloat16 if cpu_has_bfloat16() else torch.float32)


def test_peaks_of_known_gpus():
    def claimed(name: str) -> float:
        with patch('torch.cuda.get_device_name', return_value=f'NVIDIA {name}'):
            return peak_flops(torch.device('cuda'), torch.bfloat16)

    names = 'H100 80GB HBM3', 'H100 PCIe', 'GeForce RTX 4090', 'GH200 480GB', 'GB200'
    assert [claimed(name) / 1e12 for name in names] == [989, 756, 165, 989, 2500]


def test_deterministic_restores_what_it_changes():
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = settings()
    with deterministic(False):
        assert settings() == before
    with deterministic(True):
        assert settings() == (True, False) and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    assert settings() == before == (False, True)
    with patch.dict(os.environ), patch('torch.cuda.is_initialized', lambda: True):
        del os.environ['CUBLAS_WORKSPACE_CONFIG']
        with pytest.raises(BadInput, match='before this process uses CUDA'):
            deterministic(True).__enter__()  # cuBLAS would not notice


def test_two_signals_are_a_request_and_the_third_interrupts():
    with StopRequest() as stop:
        for s in (signal.SIGTERM, signal.SIGINT):
            stop.note(s, None)
        assert stop.signals == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            stop.note(signal.SIGINT, None)


def test_a_stop_does_not_wait_for_a_long_update():
    called = []
    with StopRequest(lambda: called.append(True), patience=0.01) as stop:
        stop.note(signal.SIGTERM, None)
        time.sleep(0.1)
    with StopRequest(lambda: called.append(True), patience=0.1) as stop:
        stop.note(signal.SIGTERM, None)
    time.sleep(0.2)
    assert called == [True]  # where the update ended first, nothing is called


class Board(dict):
    "The shared store, for a test without processes."

    def set(self, name, words):
        self[name] = words.encode()


def test_the_watchdog_names_the_process_that_hangs_or_all():
    board = Board()
    watchdogs = [Watchdog(board, rank, 3, timeout=600) for rank in range(3)]
    for watchdog, n in zip(watchdogs, (5, 4, 5)):
        watchdog.stopped.set()
        for _ in range(n):
            watchdog.tick()
        watchdog.tell()
    assert watchdogs[0].verdict().startswith(f'process 1 (pid {os.getpid()} on {socket.gethostname()})')
    assert watchdogs[1].verdict() == watchdogs[2].verdict() == ''  # one process reports
    watchdogs[1].tick()
    watchdogs[1].tell()
    assert watchdogs[2].verdict().startswith('all 3 processes made no progress')


class WaitingBoard(Board):
    "A store whose `get` waits, as torch.distributed's does."

    def get(self, name):
        while name not in self:
            time.sleep(0.001)
        return self[name]

    def check(self, names):
        return all(name in self for name in names)


def test_processes_agree_on_a_name_whatever_an_earlier_start_left():
    board = WaitingBoard({'id 1': b'gone', 'id 2': b'gone too', 'list of gone': b'first gone gone too'})
    with ThreadPoolExecutor(3) as pool:
        names = list(pool.map(lambda rank: rendezvous(board, rank, 3), range(3)))
    assert len(set(names)) == 1 and rendezvous(WaitingBoard(), 0, 1) != names[0]


def test_a_process_group_ends_with_its_block():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]))
    with patch.dict(os.environ, meeting | dict(RANK='0', WORLD_SIZE='1')), suppress(KeyError):
        with process_group('cpu') as world:
            assert dist.get_backend() == 'gloo' and world == DistContext(0, 1, CPU, store=world.store)
            raise KeyError('a failure inside')
    assert not dist.is_initialized()


def test_a_feed_out_of_order_at_its_end_and_after_an_error():
    asked = []

    def read(n):
        asked.append(n)
        return (torch.tensor(n if n != 4 else 1 / 0),)

    feed = Feed(read, CPU, stop=6)
    assert [feed[n][0].item() for n in (2, 3, 0, 5)] == [2, 3, 0, 5] and max(asked) == 5
    with pytest.raises(ZeroDivisionError):
        feed[4]
