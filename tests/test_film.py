"""The film in a browser: what it shows is what was recorded, the keyboard moves it, text stays text."""

import json
import shutil
from decimal import ROUND_HALF_UP, Decimal, localcontext
from pathlib import Path

import pytest

from nanomoe.film import film_html, read_film

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which('chromium')
FILM = read_film(ROOT / 'assets' / 'film.json')
COLORS = [(f'#0000{e:02x}', 'white') for e in range(64)]


@pytest.fixture(scope='module')
def tab():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        arguments = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu']
        browser = p.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page, page.wrong = browser.new_page(), []
        page.on('pageerror', lambda error: page.wrong.append(str(error)))
        yield page
        browser.close()
    assert not page.wrong


def percent(p: float) -> str:
    "As the film writes it: two digits, halves rounded up."
    if p >= 0.995 or p < 0.00005:
        return f'{100 * p:.0f} %'
    with localcontext(prec=2, rounding=ROUND_HALF_UP):
        return f'{+Decimal(100 * p):f} %'


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason='no chromium on the PATH')


@needs_chromium
def test_each_frame_shows_what_was_recorded(tab):
    tab.set_content(film_html(FILM, COLORS[: FILM['n_experts']]))
    slider, words = tab.locator('.film input'), tab.locator('.film-words')
    assert slider.input_value() == str(FILM['n_prompt'] - 1)
    slider.focus()
    tab.keyboard.press('Home')
    for i, frame in enumerate(FILM['frames']):
        said, drawn = words.text_content(), tab.locator('.film-stage').text_content()
        assert slider.input_value() == str(i)
        assert said.endswith(f'probability {percent(frame["p"])}.')
        for layer, chosen, gates, without in zip(
            FILM['layers'], frame['experts'], frame['gates'], frame['without']
        ):
            experts = ' and '.join(f'expert {e} at gate {g:.2f}' for e, g in zip(chosen, gates))
            assert f'layer {layer}: {experts}' in said
            assert all(f'without {e}: {percent(p)}' in drawn for e, p in zip(chosen, without))
        now = tab.locator('.film-text .now')
        assert now.count() == 1 and now.text_content() == FILM['pieces'][i]
        assert tab.locator('.film-stage path').count() == sum(map(len, frame['experts']))
        tab.keyboard.press('ArrowRight')
    tab.locator('[data-do=back]').click()
    assert slider.input_value() == str(len(FILM['frames']) - 2)


@needs_chromium
def test_play_goes_through_the_layers(tab):
    tab.set_content(film_html(FILM, COLORS[: FILM['n_experts']]))
    tab.evaluate('document.querySelector(".film").go(3, 0)')
    assert tab.locator('.film-stage path').count() == 0
    tab.locator('[data-do=play]').click()
    tab.wait_for_function('document.querySelectorAll(".film-stage path").length == 4')  # two layers
    tab.wait_for_function('document.querySelector(".film input").value == "4"')
    tab.locator('[data-do=play]').click()
    assert tab.locator('[data-do=play]').text_content() == 'play'


@needs_chromium
def test_text_stays_text(tab):
    evil = '<img src=x onerror="document.title=\'run\'"></script>'
    frame = FILM['frames'][0] | dict(best=[(evil, 0.5)], guesses=[[(evil, 0.5)]] * len(FILM['layers']))
    film = FILM | dict(pieces=[evil] * 3, frames=[frame] * 2, n_prompt=1)
    tab.set_content(film_html(json.loads(json.dumps(film)), COLORS[: FILM['n_experts']]))
    assert tab.locator('.film-text span').first.text_content() == evil
    assert tab.locator('.film img').count() == 0 and tab.title() != 'run'


@needs_chromium
def test_characters_that_would_steer_the_page_are_written_out(tab):
    "A change of direction and a zero byte; a joined emoji stays, and no character is cut in two."
    pieces = ['\u202eabc', '\0', '\u2028', '👩\u200d👧', 'x' * 11 + '👧👧']
    frame = FILM['frames'][0] | dict(best=[(pieces[4], 0.5)])
    film = FILM | dict(pieces=pieces, frames=[frame] * 4, n_prompt=1)
    tab.set_content(film_html(film, COLORS[: FILM['n_experts']]))
    text = tab.locator('.film-text').text_content()
    assert text == '\\u202eabc\\u0000\\u2028👩\u200d👧' + pieces[4]
    assert '\ufffd' not in tab.locator('.film-stage').inner_html()


@needs_chromium
def test_many_experts_and_dense_layers_fit(tab):
    "64 experts, of which 8 are chosen, in two of four layers."
    chosen = list(range(0, 64, 8))
    frame = dict(
        experts=[chosen] * 2,
        gates=[[0.125] * 8] * 2,
        probs=[[1 / 64] * 64] * 2,
        entropy=[4.16] * 2,
        guesses=[[('a', 0.5)]] * 2,
        without=[[0.1] * 8] * 2,
        best=[('a', 0.5)],
        p=0.5,
    )
    film = dict(n_experts=64, layers=[1, 3], n_prompt=1, pieces=['a', 'b'], frames=[frame])
    tab.set_content(film_html(film, COLORS))
    stage, circles = tab.locator('.film-stage svg').bounding_box(), tab.locator('.film-stage circle')
    assert circles.count() == 128
    for box in (circle.bounding_box() for circle in circles.all()):
        assert box['y'] >= stage['y'] and box['y'] + box['height'] <= stage['y'] + stage['height']
        assert box['x'] + box['width'] <= stage['x'] + stage['width']
