"""The site of `make site`: built once, with warnings as errors; its pages, links, search and requests."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools' / 'site'))

from check import problems_of  # noqa: E402

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
CHROMIUM = shutil.which('chromium')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the site; the build fails on a warning of Sphinx, a broken link and a foreign request."
    folder = tmp_path_factory.mktemp('site') / '_site'
    nowhere = {
        'SITE_URL': 'https://a.example/course/',
        'http_proxy': 'http://127.0.0.1:9',
        'https_proxy': 'http://127.0.0.1:9',
        'no_proxy': '',
    }
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'site' / 'build.py', folder],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(' 0 problems\n')
    return folder


@pytest.mark.parametrize(
    'page, problem',
    [
        ('<a href="other.html">', 'page.html: there is no other.html'),
        ('<a href="#nowhere">', 'page.html: there is no anchor #nowhere'),
        ('<a href="page.html#Here"><b id="here">', 'page.html: there is no anchor page.html#Here'),
        ('<img src="//cdn.example/a.png">', 'page.html: loads //cdn.example/a.png'),
        ('<script src="https://cdn.example/a.js"></script>', 'page.html: loads https://cdn.example/a.js'),
        (
            '<link rel="stylesheet" href="https://a.example/a.css">',
            'page.html: loads https://a.example/a.css',
        ),
        ('<p style="background: url(https://a.example/a.png)">', 'page.html: loads https://a.example/a.png'),
        ('<a href="https://a.example/"><a href="#here"><b id="here"><a href="">', None),
    ],
)
def test_the_checker_finds_what_is_wrong_with_a_page(tmp_path, page, problem):
    (tmp_path / 'page.html').write_text(page)
    assert problems_of(tmp_path) == [problem] * bool(problem)


def test_the_checker_reads_styles(tmp_path):
    (tmp_path / 'a.css').write_text('@import "https://a.example/b.css"; p {background: url(data:image/png,)}')
    assert problems_of(tmp_path) == ['a.css: loads https://a.example/b.css']


def test_each_notebook_is_a_page_and_a_download(site):
    assert (site / 'card.png').exists() and (site / 'favicon.png').exists()
    for path in NOTEBOOKS:
        page = (site / f'{path.stem}.html').read_text()
        assert (site / 'notebooks' / path.name).read_bytes() == path.read_bytes()
        assert f'href="notebooks/{path.name}" download' in page
        sentence = re.match(r'# .+\n+> (.+)', ''.join(json.loads(path.read_text())['cells'][0]['source']))[1]
        assert sentence in unescape(re.search('<meta name="description" content="(.*?)">', page)[1])
        assert '<meta property="og:image" content="https://a.example/course/card.png">' in page
        pictures = path.read_text().count('"image/png"') + path.read_text().count('"image/svg+xml"')
        assert len(re.findall(r'<img alt="[^"]|<svg', page)) >= pictures
        assert not re.search(r'#\s*\|\s*(hide|export|timing|slow|default_exp)|is not installed here', page)


def test_the_navigation_is_the_course_table(site):
    page = (site / 'index.html').read_text()
    links = re.findall(r'toctree-l1[^>]*><a class="reference internal" href="([^"]+)">([^<]+)', page)
    assert {target for target, _ in links} == {f'{p.stem}.html' for p in NOTEBOOKS} - {'index.html'} | {
        'api/index.html'
    }
    table = next(
        c
        for c in json.loads((ROOT / 'nbs' / 'index.ipynb').read_text())['cells']
        if c['id'] == 'course-table'
    )
    lessons = re.findall(r'\[(\d\d [^\]]+)\]\((\w+)\.ipynb\)', ''.join(table['source']))
    assert links[: len(lessons)] == [(f'{name}.html', label) for label, name in lessons]
    assert 'class="next-page" href="02_experts.html"' in (site / '01_router.html').read_text()


def test_the_reference_has_every_public_name(site):
    for path in sorted((ROOT / 'nanomoe').glob('[a-z]*.py')):
        page = (site / 'api' / f'{path.stem}.html').read_text()
        names = re.findall(r"'(\w+)'", re.search(r'__all__ = \[(.*?)\]', path.read_text(), re.S)[1])
        missing = [name for name in names if f'id="nanomoe.{path.stem}.{name}"' not in page]
        assert not missing, f'{path.stem}: {missing}'
    config = (site / 'api' / 'config.html').read_text()
    assert 'id="nanomoe.config.ModelConfig.top_k"' in config and 'experts per token' in config


@pytest.mark.skipif(not CHROMIUM, reason='no chromium on the PATH')
def test_pages_in_a_browser(site):
    "Only the server is asked, pages fit on a phone, the theme switches, answers unfold, search finds."
    from playwright.sync_api import sync_playwright

    handler = partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *words: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, asked, wrong = f'http://127.0.0.1:{server.server_port}/', [], []
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu']
        )
        page = browser.new_page(viewport={'width': 360, 'height': 740}, color_scheme='dark')
        page.on('request', lambda request: asked.append(request.url))
        page.on('pageerror', lambda error: wrong.append(str(error)))
        for name in ('index', '01_router', '10_sample', 'speed', 'commands', 'api/config'):
            page.goto(f'{address}{name}.html')
            assert page.evaluate('document.documentElement.scrollWidth') == 360, name
        dark = page.evaluate('getComputedStyle(document.body).backgroundColor')
        page.locator('.theme-toggle-header button').click()
        assert page.evaluate('getComputedStyle(document.body).backgroundColor') != dark
        page.goto(f'{address}01_router.html')
        answer = page.locator('article details:has(summary:text("Answer"))').first
        assert not answer.locator('pre, p').last.is_visible()
        answer.locator('summary').click()
        assert answer.locator('pre, p').last.is_visible()
        page.goto(f'{address}search.html?q=capacity')
        page.wait_for_selector('#search-results .search li')
        assert page.locator('#search-results .search li a').first.text_content().startswith('04 capacity')
        browser.close()
    server.shutdown()
    assert not wrong and all(url.startswith((address, 'data:')) for url in asked)
