"""The site of `make site`: built once, with warnings as errors; its pages, links, search and requests."""

import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from html import unescape
from pathlib import Path

import pytest
import torch

from nanomoe.capacity import assign_slots, expert_capacity
from nanomoe.model import GPT, flops_per_token, n_params
from nanomoe.optim import lr_at
from nanomoe.presets import PRESETS, total_active
from nanomoe.router import topk_route
from nanomoe.sizing import step_bytes
from nanomoe.viz import to_png

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools' / 'site'))

import computed  # noqa: E402
from check import problems_of  # noqa: E402
from computed import cells_of  # noqa: E402
from record import spread, thinned  # noqa: E402

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))


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
        [sys.executable, ROOT / 'tools' / 'site' / 'build.py', folder, '24_specialization'],
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
        ('<style>@import "//a.example/a.css"</style>', 'page.html: loads //a.example/a.css'),
        ('<script>fetch("https://a.example/a")</script>', 'page.html: loads //a.example/a'),
        ('<link rel="preload stylesheet" href="//a.example/">', 'page.html: loads //a.example/'),
        ('<img srcset="data:image/png,a 1x, //a.example/b.png 2x">', 'page.html: loads //a.example/b.png'),
        ('<svg><image href="//a.example/a.png"/></svg>', 'page.html: loads //a.example/a.png'),
        ('<video poster="//a.example/a.png">', 'page.html: loads //a.example/a.png'),
        ('<a href="https://a.example/"><a href="#here"><b id="here"><a href="">', None),
    ],
)
def test_the_checker_finds_what_is_wrong_with_a_page(tmp_path, page, problem):
    (tmp_path / 'page.html').write_text(page)
    assert problems_of(tmp_path) == [problem] * bool(problem)


def test_the_checker_reads_styles(tmp_path):
    (tmp_path / 'a.css').write_text('@import "https://a.example/b.css"; p {background: url(data:image/png,)}')
    (tmp_path / 'a.js').write_text("import('https://a.example/b.js'); fetch('own.json')")
    assert problems_of(tmp_path) == ['a.css: loads https://a.example/b.css', 'a.js: loads //a.example/b.js']


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
    lesson = (site / '32_files.html').read_text()
    assert 'alt="What a crash leaves behind: crash picture"' in lesson


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


def test_pages_in_a_browser(site, browser):
    "Only the server is asked, pages fit on a phone, the theme switches, answers unfold, search finds."
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *words: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, asked, wrong = f'http://127.0.0.1:{server.server_port}/', [], []
    page = browser.new_page(viewport={'width': 360, 'height': 740}, color_scheme='dark')
    page.on('request', lambda request: asked.append(request.url))
    page.on('pageerror', lambda error: wrong.append(str(error)))
    for name in ('index', '01_router', '04_capacity', '10_sample', 'speed', 'commands', 'api/config'):
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
    page.close()
    server.shutdown()
    assert not wrong and all(url.startswith((address, 'data:')) for url in asked)


def test_positions_hold_both_ends_and_the_first_value():
    assert spread(9, 3, 4) == [0, 4, 8] and spread(9, 3, 1) == [0, 1, 8] and spread(9, 4, 0) == [0, 3, 5, 8]
    assert spread(9, 2, 0) == [0, 8] == spread(9, 2, 8) and spread(9, 2, 6) == [0, 6]
    slider = dict(kind='range', values=list(range(20)), labels=list('abcdefghijklmnopqrst'), at=7)
    options = dict(kind='select', values=list(range(30)), labels=['x'] * 30, at=0)
    few, same = thinned([slider, options])
    assert few['values'] == [7, 19] and few['labels'] == ['h', 't'] and few['at'] == 0
    assert same['values'] == options['values'] and few['of'] == 20


def test_a_recorded_explorer_shows_what_the_widget_shows(site, browser, monkeypatch):
    "By keyboard, in a page opened from a file: what the notebook draws at these values."
    page = browser.new_page()
    page.goto((site / '24_specialization.html').as_uri())
    monkeypatch.chdir(ROOT / 'nbs')
    lesson = cells_of('24_specialization', 'record', 'explorer', 'favourites')

    def shown() -> bytes:
        return (site / page.locator('#explorer-live img').get_attribute('src')).read_bytes()

    assert shown() == to_png(lesson['draw_map']('seed_1', 1))
    page.get_by_role('group', name='explorer').get_by_label('seed').focus()
    page.keyboard.press('ArrowDown')
    assert shown() == to_png(lesson['draw_map']('seed_2', 1))
    page.keyboard.press('Tab')
    page.keyboard.press('ArrowLeft')
    assert shown() == to_png(lesson['draw_map']('seed_2', 0))
    alt = page.locator('#explorer-live img').get_attribute('alt')
    assert alt == 'explorer, seed seed_2, layer 0'
    assert page.evaluate("document.querySelector('#explorer-live img').naturalWidth") > 100
    page.locator('#favourites-live input').fill('1')
    table = page.evaluate(
        'html => Object.assign(document.createElement("div"), { innerHTML: html }).innerHTML',
        lesson['draw_favorites']('seed_1', 1),
    )
    assert page.locator('#favourites-live .view').inner_html() == table
    page.close()
    still = (site / '00_first_mixture.html').read_text()  # not recorded for this test
    assert 'class="explorer"' not in still and 'explorers.js' not in still


# What the notebooks and the package compute at the values of an explorer's controls


def router_numbers(data: dict, top_k: int, temperature: float) -> dict:
    r, normalized = (topk_route(torch.tensor([data['logits']]) / temperature, top_k, norm) for norm in (0, 1))
    numbers = dict(probs=r.probs, ids=r.expert_ids, gates=r.gates, normalized=normalized.gates)
    return {name: tensor[0].tolist() for name, tensor in numbers.items()}


def plane_numbers(data: dict, top_k: int, temperature: float, norm_topk_prob: bool) -> dict:
    logits = torch.tensor([data['token']]) @ torch.tensor(data['arrows']).T / temperature
    r = topk_route(logits, top_k, norm_topk_prob)
    numbers = dict(logits=logits, probs=r.probs, ids=r.expert_ids, gates=r.gates)
    return {name: tensor[0].tolist() for name, tensor in numbers.items()}


def cost_numbers(data: dict, E: int, K: int, F: int) -> dict:
    lesson = cells_of('02_experts', 'mlp-test', 'cost', 'layer-cost')
    cost, matched = lesson['layer_cost'](E, K, F), lesson['dense_cost'](K, F)
    return dict(cost=list(cost.values()), matched=list(matched.values()), sets=math.comb(E, K))


def dropped_numbers(data: dict, capacity_factor: float, skew: float, priority: str) -> dict:
    lesson = cells_of('04_capacity', *DROPS)
    r, S = lesson['routing'](skew, 2048), expert_capacity(2048, 8, 2, capacity_factor)
    kept = assign_slots(r.expert_ids, 8, S, priority, r.gates).kept
    first, second = lesson['drops_by_position'](kept).T.tolist()
    return dict(first=first, second=second, dropped=1 - kept.float().mean().item())


def leak_numbers(data: dict, token: int, priority: str, factor: float, rows: int) -> dict:
    lesson, S = cells_of('04_capacity', 'layer'), expert_capacity(32 // rows, 4, 2, factor)
    x, other = lesson['x'], lesson['x'].clone()
    other[token] = torch.randn(16, generator=torch.Generator().manual_seed(token))
    numbers, row = {}, torch.arange(32)[:, None] * rows // 32
    for name, tokens in (('before', x), ('after', other)):
        r = topk_route(tokens @ lesson['router'], 2)
        kept = assign_slots(r.expert_ids * rows + row, 4 * rows, S, priority, r.gates).kept
        numbers[name] = dict(ids=r.expert_ids.tolist(), kept=kept.tolist())
    before, after = (lesson['layer'](t, S, priority=priority, n_rows=rows) for t in (x, other))
    outputs = ((after - before).abs().amax(1) > 1e-4).nonzero().flatten().tolist()
    later = sum(n > token for n in outputs)
    return numbers | dict(outputs=outputs, later=later, earlier=sum(n < token for n in outputs))


def size_numbers(data: dict, n_experts: int, top_k: int, moe_every: int) -> dict:
    lesson = cells_of('07_model', 'architecture', 'parts-by-hand')
    shape = dict(n_experts=n_experts, top_k=min(top_k, n_experts), moe_every=moe_every)
    cfg = replace(lesson['nano'], **shape)
    with torch.device('meta'):
        total, active = n_params(GPT(cfg))
    parts = list(lesson['parts_by_hand'](cfg).values())
    return dict(parts=parts, total=total, active=active, flops=flops_per_token(cfg))


def rate_numbers(data: dict, warmup_iters: int, peak: float, floor: float, max_iters: int) -> dict:
    rate, shape = peak / 1000, dict(warmup_iters=warmup_iters, max_iters=max_iters)
    cfg = replace(PRESETS['tiny'][1], learning_rate=rate, min_lr=floor * rate, **shape)
    rates = [1000 * lr_at(step, cfg) for step in range(1000)]
    return dict(rates=rates, sum=sum(rates) / 1000)


def waiting_numbers(data: dict, skew: float, capacity: float, P: int) -> dict:
    lesson = cells_of('12_expert_parallel', 'waiting')
    rows, dropped = lesson['rows_of_experts'](skew, capacity if capacity < 4 else None)
    return dict(rows=rows.tolist(), dropped=dropped, waiting=lesson['waiting'](rows, P))


def plan_numbers(data: dict, dollars: int, experts: int, top_k: int, price: float, mfu: float) -> dict:
    lesson = cells_of('26_sizing', *computed.BILL)
    budget = dollars / price * 3600 * lesson['PEAK']['H100'] * mfu
    plans = [lesson['afford'](budget, 1, 1), lesson['afford'](budget, experts, min(top_k, experts))]
    sizes = [total_active(cfg) for cfg, _ in plans]
    return dict(
        budget=budget,
        days=lesson['bill'](*plans[1], mfu=mfu, price=price)[0],
        layers=[cfg.n_layer for cfg, _ in plans],
        total=[total for total, _ in sizes],
        active=[active for _, active in sizes],
        tokens=[tokens for _, tokens in plans],
        bytes=[list(step_bytes(cfg, 8, True).values()) for cfg, _ in plans],
    )


DROPS = 'queue-by-loop demand places-by-cumsum assign-slots-oracle token-order-price'.split()
NUMBERS = {  # explorer -> what its numbers should be, and positions of its controls
    ('01_router', 'explorer'): (router_numbers, [(0, 15), (2, 3), (7, 75)]),
    ('01_router', 'walk-picture'): (plane_numbers, [(1, 15, 0), (0, 40, 0), (2, 2, 1)]),
    ('02_experts', 'explorer'): (cost_numbers, [(8, 3, 7), (0, 7, 0), (56, 7, 15)]),
    ('04_capacity', 'explorer'): (dropped_numbers, [(15, 20, 0), (5, 40, 1), (11, 25, 2)]),
    ('04_capacity', 'leak-explore'): (leak_numbers, [(16, 0, 5, 0), (3, 2, 0, 1), (25, 1, 9, 2)]),
    ('07_model', 'explorer'): (size_numbers, [(6, 1, 1), (0, 7, 5), (30, 7, 0)]),
    ('08_optim', 'schedule-explore'): (rate_numbers, [(10, 25, 2, 16), (0, 0, 20, 3), (50, 95, 0, 0)]),
    ('12_expert_parallel', 'waiting-explorer'): (waiting_numbers, [(12, 60, 2), (40, 50, 3), (21, 9, 4)]),
    ('26_sizing', 'explorer'): (plan_numbers, [(5, 14, 1, 8, 25), (0, 0, 3, 0, 0), (14, 62, 0, 38, 55)]),
}


def test_every_computed_explorer_is_compared():
    assert NUMBERS.keys() == computed.EXPLORERS.keys()


def same(numbers, expected) -> bool:
    "Equal up to the rounding of float32, in lists and by name."
    if isinstance(expected, dict):
        return all(same(numbers[name], value) for name, value in expected.items())
    if isinstance(expected, list):
        return len(numbers) == len(expected) and all(map(same, numbers, expected))
    return numbers == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize('explorer', NUMBERS, ids='/'.join)
def test_a_computed_explorer_has_the_numbers_of_the_lesson(site, browser, explorer):
    (name, cell), (expected, places) = explorer, NUMBERS[explorer]
    spec, page, wrong = computed.EXPLORERS[explorer](), browser.new_page(), []
    page.on('pageerror', lambda error: wrong.append(str(error)))
    page.goto((site / f'{name}.html').as_uri())
    for at in places:
        values = {}
        for i, (control, position) in enumerate(zip(spec['controls'], at)):
            field = page.locator(f'#{cell}-live-{i}')
            if control['kind'] == 'range':
                field.fill(str(position))
            elif control['kind'] == 'checkbox':
                field.set_checked(bool(position))
            else:
                field.select_option(index=position)
            values[control['name']] = control['values'][position]
        numbers = page.evaluate(f"document.getElementById('{cell}-live').numbers")
        assert same(numbers, expected(spec['data'], **values)), (values, numbers)
    assert not wrong and page.locator(f'#{cell}-live .numbers').text_content()
    for mark in page.locator(f'#{cell}-live svg [role=slider]').all():
        least, now, most = (float(mark.get_attribute(f'aria-value{name}')) for name in ('min', 'now', 'max'))
        assert least <= now <= most
    page.close()


def test_marks_follow_the_pointer_and_arrow_keys(site, browser):
    page = browser.new_page()
    page.goto((site / '01_router.html').as_uri())
    mark = page.get_by_role('slider', name='logit of expert 4')
    mark.scroll_into_view_if_needed()
    box, logit = mark.bounding_box(), "document.getElementById('explorer-live').numbers.logits[4]"
    x, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
    before = page.evaluate(logit)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 50)
    page.mouse.up()
    page.mouse.move(x, y)
    dragged = page.evaluate(logit)
    assert dragged > before + 1
    page.keyboard.press('ArrowDown')
    assert page.evaluate(logit) == pytest.approx(dragged - 0.1)
    page.close()
