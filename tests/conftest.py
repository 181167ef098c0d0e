"""Options of the tests: how long to go on breaking things, the seed of what breaks when, how much to click through."""
import time

import pytest


def pytest_addoption(parser):
    parser.addoption('--soak', action='store_true', help='100 kills and 1000 fuzzed files in place of a few')
    parser.addoption('--every-notebook', action='store_true', help='all notebooks in the browser in place of a half')
    parser.addoption('--seed', type=int, default=time.time_ns() % 1_000_000, help='of random kills and flips')


@pytest.fixture
def soak(request) -> bool: return request.config.getoption('--soak')


@pytest.fixture
def seed(request) -> int: return request.config.getoption('--seed')


def pytest_report_header(config): return f'random kills and flips: --seed {config.getoption("--seed")}'
