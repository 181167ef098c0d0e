"""Options of the tests: how long to go on breaking things, and the seed of what breaks when."""
import time

import pytest


def pytest_addoption(parser):
    parser.addoption('--soak', action='store_true', help='100 kills and 1000 fuzzed files in place of a few')
    parser.addoption('--seed', type=int, default=time.time_ns() % 1_000_000, help='of random kills and flips')


@pytest.fixture
def soak(request) -> bool: return request.config.getoption('--soak')


@pytest.fixture
def seed(request) -> int: return request.config.getoption('--seed')


def pytest_report_header(config): return f'random kills and flips: --seed {config.getoption("--seed")}'
