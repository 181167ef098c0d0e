"""Pictures of runs that are not as they should be: dense, diverged, damaged, by two writers, oddly named."""

import http.client
import io
import json
import os
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomoe import board as boards
from nanomoe import report as reports
from nanomoe import viz
from nanomoe import watch as watching
from nanomoe.config import BadInput, ModelConfig, TrainConfig, to_dict
from nanomoe.router import topk_route
from nanomoe.losses import Losses
from nanomoe.metrics import MOST_PARSED, History, diagnose, health, step_stats
from nanomoe.board import board_svg, svg_words
from nanomoe.report import experts_figure, health_figure, read_rows, report, samples_of
from nanomoe.viz import to_png
from nanomoe.watch import server


def row(step: int, **other) -> dict:
    "A log line of two layers of four experts."
    rng = np.random.default_rng(step)
    health = dict(max_load=[1.5, 1.2], entropy=[1.3, 1.2], margin=[0.1, 0.2])
    return (
        dict(
            step=step,
            tokens=64 * step,
            ce=5 / step,
            load=rng.integers(1, 40, (2, 4)).tolist(),
            drop_rate=0.0,
            health=health,
            grad_norm=1.0,
            lr=0.1,
            tok_per_s=100.0,
            val_ce=5 / step,
            val_bpb=8 / step,
            val_load_a=[[1, 2, 3, 4]] * 2,
        )
        | other
    )


def text(step: int, domain: str = 'a', pieces: list[str] = list('abcdef'), K: int = 2, **other) -> dict:
    "A line of samples.jsonl for two layers."
    rng = np.random.default_rng(step)
    ids = np.stack([[rng.permutation(4)[:K] for _ in pieces] for _ in range(2)])
    return (
        dict(
            step=step,
            domain=domain,
            text=''.join(pieces),
            pieces=pieces,
            expert_ids=ids.tolist(),
            gates=np.full(ids.shape, 0.5).tolist(),
            kept=[None, None],
        )
        | other
    )


def run_of(folder: Path, rows, texts=(), settings=dict(max_iters=9, dataset='gone', n_experts=4)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (('log', rows), ('samples', texts)):
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if settings is not None:
        (folder / 'config.json').write_text(json.dumps(settings))
    return folder


WHOLE = [row(s) for s in range(1, 6)]
ILL = {
    'one line': [row(1)],
    'dense': [row(s, load=[], health={k: [] for k in row(1)['health']}) for s in (1, 2, 3)],
    'never evaluated': [{k: v for k, v in row(s).items() if not k.startswith('val')} for s in (1, 2, 3)],
    'a loss that is not finite': WHOLE + [row(6, ce=float('nan'), val_ce=float('nan'), val_bpb=float('nan'))],
    'a gradient that overflowed': [row(1, grad_norm=float('inf'))] + WHOLE[1:],
    'never finite': [row(s, ce=float('nan'), val_ce=float('inf'), val_bpb=float('inf')) for s in (1, 2)],
}


@pytest.mark.parametrize('name', ILL)
def test_an_ill_run_has_a_report_and_a_board(name, tmp_path):
    rows = ILL[name]
    page = report(run_of(tmp_path / 'run', rows, [text(rows[-1]['step'])] if rows[-1].get('load') else []))
    assert 'nan' not in page.split('<h2>Loss')[0] and page.count('<h2>') >= 4
    svg = board_svg(rows)
    assert 'nan' not in svg and 'inf' not in svg
    if name == 'a loss that is not finite':
        assert svg.count('<circle') == 5 and 'polyline' in svg  # what was finite is drawn
        assert '1.600 bits per byte' in page  # the last finite evaluation, 8 / 5
    if name == 'dense':
        assert len(health_figure(rows).axes) == 4


def test_a_page_of_a_run_without_settings_does_not_make_them_up(tmp_path):
    assert '<td>5</td>' in report(run_of(tmp_path / 'run', WHOLE, settings=None))
    assert '<td>5 of 9</td>' in report(run_of(tmp_path / 'other', WHOLE))


def test_names_and_texts_are_shown_as_they_are(tmp_path):
    "Markup in a piece or a domain is text; dollar signs are no formula; a point is a name too."
    evil = '<script>alert(1)</script>'
    run = run_of(
        tmp_path / 'cost$\\foo$ & <b>',
        [row(s, **{'val_load_x$\\y$': [[1, 2, 3, 4]] * 2}) for s in (1, 2)],
        [text(2, evil, [evil, '"', "'", '&', '\n', '日'])],
    )
    page = report(run)
    assert '<script' not in page and '&lt;script&gt;' in page and 'cost$\\foo$ &amp; &lt;b&gt;</h1>' in page
    assert to_png(experts_figure(read_rows(run / 'log.jsonl'), run.name))[:4] == b'\x89PNG'


def test_samples_count_when_their_line_is_logged(tmp_path):
    "The trainer writes an evaluation's texts, then its line: texts without a line are not all there yet."
    texts = [text(2, 'a'), text(2, 'b'), text(4, 'a')]
    assert samples_of(texts, 3).steps == [2] and len(samples_of(texts, 3).pieces) == 12
    assert samples_of(texts + [text(4, 'b')], 4).steps == [2, 4] and samples_of(texts, 1) is None
    assert samples_of(texts + texts, 3).expert_ids.shape == (1, 2, 12, 2)  # the same text twice is one
    narrower = [text(4, 'a', K=1), text(4, 'b', K=1)]
    assert samples_of(texts[:2] + narrower, 4).steps == [4]  # top_k was changed on the way
    assert samples_of([text(2, expert_ids=[])], 2) is None  # a dense model


def test_where_experts_choose_only_the_text_is_shown(tmp_path):
    "Each token then names all experts, and counting choices would say nothing."
    page = report(
        run_of(
            tmp_path / 'run',
            WHOLE,
            [text(5, K=4, kept=[[[True, False, False, False]] * 6] * 2)],
            dict(max_iters=9, dataset='gone', n_experts=4, router='expert_choice'),
        )
    )
    assert 'Text by expert' in page and 'Favorite' not in page and 'settled' not in page


DAMAGE = {
    'log.jsonl': [
        'xyz',
        '3',
        '[1]',
        '{"a": 1}',
        '{"step": "3"}',
        '{"step": true}',
        '{"step": 2, "ce": "low"}',
        '{"step": 2, "load": [[1, 2], [3]]}',
        '{"step": 2, "ce": [1]',
        '{"step": 2, "health": "good"}',
        '[' * 5000,
        '\0\0\0',
        '{"step": 2, "ce": {"a": []}, "load": {"x": "y"}}',
    ],
    'samples.jsonl': [
        'xyz',
        '{"step": 5}',
        json.dumps(text(5) | {'pieces': 'abc'}),
        json.dumps(text(5) | {'expert_ids': [[1]]}),
        json.dumps(text(5) | {'gates': [['x']]}),
        json.dumps(text(5) | {'domain': 3}),
        json.dumps(text(5) | {'kept': [[1], [2]]}),
        json.dumps(text(5) | {'continuation': 3}),
    ],
}


@pytest.mark.parametrize('file', DAMAGE)
def test_a_damaged_line_costs_itself(file, tmp_path, capsys):
    "Report, pictures and watcher show what the other lines say, and one word for each that is left out."
    run = run_of(tmp_path / 'run', WHOLE, [text(4), text(5)])
    whole = {
        kind: reports.render(kind, str(run), None).read_bytes() for kind in ('report', 'curve', 'experts')
    }
    lines = (run / file).read_text().splitlines(True)
    (run / file).write_text(lines[0] + ''.join(line + '\n' for line in DAMAGE[file]) + ''.join(lines[1:]))
    capsys.readouterr()
    assert {kind: reports.render(kind, str(run), None).read_bytes() for kind in whole} == whole
    said = capsys.readouterr().err.count('cannot be read and is left out')
    # once for each picture that reads the file
    assert said == len(DAMAGE[file]) * (3 if file == 'log.jsonl' else 1)
    live = watching.Live(run)
    assert (
        json.loads(live.answer('board', -1)[1])['step'] == 5
        and json.loads(live.answer('text', -1)[1])['step'] == 5
    )


def test_the_later_of_two_writers_is_shown(tmp_path):
    """As after a kill of which something lived on: what a later line of the same step or an earlier one
    replaces is left out.
    """
    run = run_of(tmp_path / 'run', [row(s) for s in (1, 3, 4, 2, 3)])
    assert [r['step'] for r in read_rows(run / 'log.jsonl')] == [1, 2, 3]
    odd = run_of(tmp_path / 'odd', [*WHOLE[:2], row(999_999), *WHOLE[2:]])
    assert [r['step'] for r in read_rows(odd / 'log.jsonl')] == [1, 2, 3, 4, 5] and '<h2>Experts' in report(
        odd
    )


def test_every_picture_shows_the_same_losses(tmp_path, monkeypatch):
    """Report, curve, watcher and board: bits per byte by the log, or for a log of before by its last
    evaluation; without any, nats.
    """
    drawn, real = [], viz.curve_points
    for module in (viz, boards):
        monkeypatch.setattr(module, 'curve_points', lambda rows: drawn.append(real(rows)) or drawn[-1])
    bare = [{k: v for k, v in row(s).items() if not k.startswith('val')} for s in (1, 2)]
    for rows, unit, wanted in (
        ([row(s, bpb=7 / s) for s in (1, 2)], 'bits per byte', [7, 3.5]),
        (WHOLE[:2], 'bits per byte', [8, 4]),
        ([row(1, bpb=7), row(2), row(3, bpb=float('nan'))], 'bits per byte', [7]),
        (bare, 'nats per token', [5, 2.5]),
    ):
        drawn.clear()
        run = run_of(tmp_path / f'run{wanted}', rows)
        page = report(run)
        reports.curve_of(run)
        board = json.loads(watching.Live(run).answer('board', -1)[1])['svg']
        assert (
            f'Loss, {unit}' in board
            and f'{unit}: — batch' in board_svg(read_rows(run / 'log.jsonl'))
            and '<h2>Loss' in page
        )
        assert len(drawn) == 4 and {u for u, *_ in drawn} == {unit}
        for _, trained, held in drawn:
            assert trained[:, 1].tolist() == pytest.approx(wanted) and (held == drawn[0][2]).all()


BAD = {
    'no line': ('log.jsonl', 'xyz\n', 'holds no line of a run'),
    'no loss': ('log.jsonl', '{"step": 3}\n', 'holds no loss'),
    'settings of another': ('config.json', '{"a": 1}', 'is not the config.json of a run'),
    'settings cut off': ('config.json', '{"max_iters": ', 'is not the config.json of a run'),
    'settings too deep': ('config.json', '[' * 100_000, 'is not the config.json of a run'),
    'a folder': ('config.json', None, 'cannot be read: Is a directory'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_damaged_file_gets_one_sentence(name, tmp_path, capsys):
    file, content, sentence = BAD[name]
    run = run_of(tmp_path / 'run', WHOLE, [text(5)])
    if content is None:
        (run / file).unlink()
        (run / file).mkdir()
    else:
        (run / file).write_text(content)
    with pytest.raises(SystemExit) as stop:
        watching.main(['report', str(run)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in said.splitlines()[-1]
    assert not (run / 'report.html').exists()


@pytest.mark.parametrize(
    'words, sentence',
    [
        ('experts {run} --out {run}', 'cannot be written: Is a directory'),
        ('watch {run} --port 70000 --open=False', 'port 70000 of 127.0.0.1 cannot be used'),
    ],
)
def test_what_cannot_be_done_gets_one_sentence(words, sentence, tmp_path, capsys):
    run = run_of(tmp_path / 'run', WHOLE)
    with pytest.raises(SystemExit) as stop:
        watching.main(words.format(run=run).split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in said and said.count('\n') == 1


def test_sureness_is_what_the_log_calls_entropy_and_margin():
    "The picture of a routing and the trainer's log lines measure the same two things, each in its own way."
    r = topk_route(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), 2)
    logged = health(step_stats(Losses(*torch.zeros(4)), (r,)), 200)
    entropy, margin = viz.confidence(r.probs, r.expert_ids)
    assert logged.entropy[0] == pytest.approx(entropy.mean(), rel=1e-5)
    assert logged.margin[0] == pytest.approx(margin.mean(), rel=1e-5)


def test_help_of_the_watcher_names_its_port(capsys):
    with pytest.raises(SystemExit) as stop:
        watching.main(['watch', '--help'])
    assert stop.value.code == 0 and '--port' in capsys.readouterr().out


def test_the_watcher_says_what_is_wrong_and_goes_on(tmp_path):
    run = run_of(tmp_path / 'run', WHOLE, [text(5)])
    http = server(run)
    threading.Thread(target=http.serve_forever, daemon=True).start()

    def ask(path):
        try:
            answer = urllib.request.urlopen(f'http://127.0.0.1:{http.server_port}{path}')
        except urllib.error.HTTPError as e:
            answer = e
        return answer.status, answer.read().decode()

    try:
        assert ask('/board?layer=-5')[0] == ask('/board?layer=99')[0] == ask('/board?step=%C2%B2')[0] == 200
        assert ask('/elsewhere')[0] == 404
        (run / 'config.json').write_text('{')
        status, said = ask('/board')
        assert status == 500 and 'is not the config.json of a run' in said
        (run / 'config.json').write_text(json.dumps(dict(max_iters=9, dataset='gone', n_experts=4)))
        assert ask('/board')[0] == ask('/text')[0] == 200  # mended, and so is the page
        shutil.rmtree(run)
        assert 'which is not there' in ask('/board')[1]
    finally:
        http.shutdown()
        http.server_close()


def test_an_update_leaves_what_the_reader_opened(browser, tmp_path):
    "What is unfolded, which layer's text is shown and where the keyboard is."
    bpb = {f'val_bpb_{name}': 2.0 for name in 'abcdefghijklm'}
    run = run_of(tmp_path / 'run', [row(step, **bpb) for step in (1, 2)], [text(2)])
    page = browser.new_page()
    with watching.server(run, 0) as watcher:
        threading.Thread(target=watcher.serve_forever, daemon=True).start()
        page.goto(f'http://127.0.0.1:{watcher.server_port}')
        summary = page.locator('#facts summary')
        summary.click()
        page.locator('label[for=text-1]').click()
        page.locator('#text-1').focus()
        for step in (3, 4):
            for name, line in (('log', row(step, **bpb)), ('samples', text(step))):
                with (run / f'{name}.jsonl').open('a') as lines:
                    lines.write(json.dumps(line) + '\n')
            page.get_by_text(f'{step} of 9', exact=True).wait_for(timeout=20_000)
            page.wait_for_function('step => have.text === step', arg=step)
            assert page.locator('#facts details').evaluate('one => one.open')
            assert page.locator('#text-1').is_checked() and page.locator('#text-pane-1').is_visible()
            assert page.evaluate('document.activeElement.id') == 'text-1'
        watcher.shutdown()
    page.get_by_text('Viewer stopped').wait_for(timeout=20_000)
    page.close()


def test_a_page_finds_runs_that_begin_after_it(browser, tmp_path):
    "In an empty folder first none, then a list that grows."
    page, folder = browser.new_page(), tmp_path / 'out'
    folder.mkdir()
    with watching.server(folder, 0) as watcher:
        threading.Thread(target=watcher.serve_forever, daemon=True).start()
        page.goto(f'http://127.0.0.1:{watcher.server_port}')
        for name in ('first', 'second'):
            run_of(folder / name, WHOLE)
            page.locator(f'a.run[href="{name}/"]').wait_for(timeout=20_000)
        page.locator('a.run').first.click()
        page.get_by_text('5 of 9', exact=True).wait_for(timeout=20_000)
        watcher.shutdown()
    page.close()


def test_the_page_of_a_run_answers_this_machine_only(tmp_path):
    """A page on the web whose name was made to lead here (DNS rebinding) gets nothing, and no address makes
    the server fall.
    """
    (tmp_path / 'config.json').write_text(json.dumps(to_dict(ModelConfig(), TrainConfig())))
    (tmp_path / 'log.jsonl').write_text(json.dumps(dict(step=1, ce=3.0)) + '\n')
    with watching.server(tmp_path, 0) as watcher:
        threading.Thread(target=watcher.serve_forever, daemon=True).start()

        def status(host: str, path: str = '/board') -> int:
            line = http.client.HTTPConnection('127.0.0.1', watcher.server_port, timeout=10)
            line.putrequest('GET', path, skip_host=True)
            if host:
                line.putheader('Host', host)
            line.endheaders()
            return line.getresponse().status

        port = watcher.server_port
        assert [status(f'{name}:{port}') for name in ('127.0.0.1', 'localhost', '[::1]')] == [200] * 3
        assert [status(host) for host in (f'evil.example:{port}', '127.0.0.1.evil.example', '')] == [403] * 3
        assert status('localhost', 'http://[::1') == 400
        watcher.shutdown()


@pytest.mark.parametrize(
    'change',
    [
        lambda line: line['expert_ids'][0][0].__setitem__(1, {'"><img src=x onerror=alert(1)>': 0}),
        lambda line: line.pop('gates'),
        lambda line: line.pop('domain'),
    ],
)
def test_samples_that_are_none_are_left_out(change, tmp_path, capsys):
    "Above all no tags: what stands where an expert's number should never reaches a page."
    (tmp_path / 'config.json').write_text(
        json.dumps(to_dict(ModelConfig(n_experts=4, router='expert_choice'), TrainConfig()))
    )
    (tmp_path / 'log.jsonl').write_text(json.dumps(dict(step=1, ce=3.0, val_ce=3.0, val_bpb=1.0)) + '\n')
    line = dict(
        step=1,
        domain='d',
        text='ab',
        pieces=['a', 'b'],
        ids=[0, 1],
        expert_ids=[[[0, 1], [2, 3]]],
        gates=[[[0.5, 0.5], [0.5, 0.5]]],
        kept=[None],
    )
    change(line)
    (tmp_path / 'samples.jsonl').write_text(json.dumps(line) + '\n')
    page = reports.report(tmp_path)
    assert (
        'onerror' not in page
        and 'Text by expert' not in page
        and 'samples.jsonl line 1 cannot be read' in capsys.readouterr().err
    )
    with pytest.raises(TypeError):
        viz.colored_text(['a'], [[{'<b>': 0}]])


def test_colors_keep_their_meaning_in_a_palette():
    "Areas, small dots and thin lines of every expert, exactly; 256 shades nearly."
    fig = viz.new_figure(4, 3)
    ax = fig.subplots()
    for e in range(24):
        ax.scatter([e], [0], s=9, color=viz.expert_color(e), linewidths=0)
        ax.plot([0, 24], [e + 1, e + 1], lw=1, color=viz.expert_color(e), antialiased=False)
    # many more areas
    ax.imshow(
        np.random.default_rng(0).random((40, 24)), cmap='viridis', extent=(0, 24, 30, 60), aspect='auto'
    )
    ax.set(xlim=(-1, 25), ylim=(-1, 60))
    full = io.BytesIO()
    fig.savefig(full, format='png')
    before, after = (
        np.asarray(PIL.Image.open(io.BytesIO(b)).convert('RGB')) for b in (full.getvalue(), to_png(fig))
    )
    for e in range(24):
        rgb = [int(viz.expert_color(e)[i : i + 2], 16) for i in (1, 3, 5)]
        here = (before == rgb).all(-1)
        assert here.any() and (after[here] == rgb).all(), e
    assert (
        to_png(viz.new_figure(1, 1)) == to_png(viz.new_figure(1, 1))
        and to_png(viz.new_figure(1, 1))[:4] == b'\x89PNG'
    )
    for picture, most in (
        (np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1), 0),
        (np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3)), 17 / 2),
    ):
        assert (
            abs(
                np.asarray(viz.in_palette(PIL.Image.fromarray(picture)).convert('RGB')) - picture.astype(int)
            ).max()
            <= most
        )


# what an eye without one kind of receptor makes of linear light: Machado, Oliveira and Fernandes (2009)
EYES = {
    'all receptors': np.eye(3),
    'no red': np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]]),
    'no green': np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
}


def linear(rgb):
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def seen(palette, eye: str) -> np.ndarray:
    "The colors as that eye sees them, RGB (n, 3)."
    light = linear(np.array([viz.matplotlib.colors.to_rgb(c) for c in palette])) @ EYES[eye].T
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def closest(palette, eye: str) -> float:
    "Distance of the two most similar colors in CIELAB units; below 10 they are easily confused."
    to_xyz = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8729]])
    f = np.cbrt(linear(seen(palette, eye)) @ to_xyz.T)
    lab = np.stack([116 * f[:, 1], 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    return np.linalg.norm(lab[:, None] - lab, axis=-1)[~np.eye(len(palette), dtype=bool)].min()


def test_everybody_can_tell_the_experts_apart():
    "Without receptors for red or green the eight colors remain distinct; matplotlib's usual eight don't."
    ours = [viz.expert_color(e) for e in range(8)]
    usual = [viz.matplotlib.colormaps['tab10'](e)[:3] for e in range(8)]
    for eye in EYES:
        np.testing.assert_allclose(seen(['#808080'], eye), 128 / 255, atol=1e-3)  # gray stays gray
    assert min(closest(ours, eye) for eye in EYES) > 15 > 10 > min(closest(usual, eye) for eye in EYES)


def test_text_on_a_color_has_contrast():
    "More than the 4.5 that WCAG 2 asks of text, on every expert's color and its tints."

    def contrast(a: str, b: str) -> float:
        dark, light = sorted((viz.luminance(a), viz.luminance(b)))
        return (light + 0.05) / (dark + 0.05)

    assert round(contrast('white', 'black')) == 21
    for color in map(viz.expert_color, range(8)):
        for strength in (0, 0.25, 0.5, 0.75, 1):
            shade = viz.tint(color, strength)
            assert contrast(shade, viz.text_color(shade)) > 4.5


def test_templates_escape_their_values():
    assert viz.render_html('<b>{{ word }}</b>', word='a<b') == '<b>a&lt;b</b>'
    assert viz.render_html('{{ word|safe }}', word='<i>') == '<i>'  # HTML already
    page = viz.render_html('<span style="{{ label(0) }};{{ paper }}">')
    assert viz.label_style(0) in page and viz.paper in page


def test_pictures_have_no_small_letters():
    "Nothing below 7 points, in the plots of viz and in the architecture diagram."
    ids = np.arange(16).reshape(8, 2) % 4
    load = [[1, 2, 3, 4]] * 2
    figures = [
        viz.load_bars([1, 2, 3], [0, 1, 0], 2),
        viz.load_heatmap(load),
        viz.load_history([row(1), row(2)]),
        viz.coactivation(ids, 4),
        viz.flow(ids.T, 4),
        viz.draw_model(ModelConfig(vocab_size=9, n_experts=64)),
    ]
    for fig in figures:
        fig.canvas.draw()
        sizes = [t.get_fontsize() for t in fig.findobj(viz.matplotlib.text.Text) if t.get_text().strip()]
        assert sizes and min(sizes) >= 7


def test_a_watcher_waits_for_its_run(tmp_path, capsys, monkeypatch):
    """Started first, with another run beside it: it says so, serves, and shows the run when it comes, also
    after a new beginning.
    """
    run_of(tmp_path / 'other', WHOLE)
    (tmp_path / 'none').mkdir()
    monkeypatch.setattr(
        watching.ThreadingHTTPServer, 'serve_forever', lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    watching.watch(tmp_path / 'later', 0, False)
    said = capsys.readouterr().out
    assert f'waiting     for {tmp_path}/later; runs beside it: other' in said and 'ssh -L ' in said
    live = watching.Live(tmp_path / 'later')
    assert '<script>' in live.answer('', -1)[1]
    with pytest.raises(BadInput, match='waiting for'):
        live.answer('board', -1)
    for rows in (WHOLE, WHOLE[:2], WHOLE[:1] * 1):
        shutil.rmtree(tmp_path / 'later', ignore_errors=True)
        with pytest.raises(BadInput, match='waiting for'):
            live.answer('board', -1)
        run_of(tmp_path / 'later', rows)
        assert json.loads(live.answer('board', -1)[1])['step'] == rows[-1]['step']


def test_who_may_ask_the_watcher(tmp_path):
    """Numbers, this machine's names and the given host.

    Never a name from elsewhere, which its owner can make lead here.
    """
    run, me = run_of(tmp_path / 'run', WHOLE), socket.gethostname()
    for host, allowed, refused in (
        (
            '127.0.0.1',
            ['127.0.0.1', 'localhost:8712', '[::1]', '192.168.0.7:1'],
            ['evil.example', f'{me}.example', '', 'localhost.evil'],
        ),
        ('0.0.0.0', ['10.0.0.1', me, 'localhost'], ['evil.example']),
    ):
        with server(run, 0, host) as http:
            threading.Thread(target=http.serve_forever, daemon=True).start()
            for name in allowed + refused:
                connection = http_client(http.server_port)
                connection.request('GET', '/', headers={'Host': name})
                assert connection.getresponse().status == (200 if name in allowed else 403), (host, name)
            http.shutdown()


def test_the_usual_port_may_be_taken(tmp_path, capsys, monkeypatch):
    run = run_of(tmp_path / 'run', WHOLE)
    monkeypatch.setattr(
        watching.ThreadingHTTPServer, 'serve_forever', lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f'port {port} of 127.0.0.1 cannot be used'):
            watching.watch(run, port, False)


def http_client(port: int):
    return http.client.HTTPConnection('127.0.0.1', port, timeout=10)


@pytest.mark.parametrize(
    'rows',
    [
        [row(s) | {'health': {'max_load': [1.0]}} for s in (1, 2)],
        [row(1), row(2, load=[[1, 2, 3, 4]] * 3), row(3)],
        [row(1), row(2, val_load_a=[[1, 2]]), row(3)],
        [row(1), row(2, health=3), row(3)],
        [row(1), row(2, ce=10**400), row(3)],
        [row(1), row(2, load=[[{}] * 4] * 2), row(3)],
        [row(1), row(2, val_bpb=[1]), row(3)],
        [row(1), row(2, tokens=[1]), row(3)],
    ],
)
def test_a_figure_of_another_shape_costs_its_line(rows, tmp_path):
    run = run_of(
        tmp_path / 'run',
        rows,
        [
            text(3),
            text(3, 'b', expert_ids=[[[0, 9]] * 6] * 2),
            text(3, 'c', expert_ids=[[[0, 1]] * 6], gates=[[[0.5, 0.5]] * 6], kept=[None]),
        ],
    )
    whole = [r['step'] for r in rows if r['step'] != 2] if len(rows) == 3 else []
    if not whole:
        with pytest.raises(BadInput, match='holds no line of a run yet'):
            report(run)
        return
    assert [r['step'] for r in read_rows(run / 'log.jsonl')] == whole and '<h2>Experts' in report(run)
    assert json.loads(watching.Live(run).answer('board', -1)[1])['step'] == 3 and watching.Live(run).answer(
        'text', -1
    )


def test_many_domains_with_long_names_stay_readable():
    "Eleven of their own, the others as one, no name longer than what fits; no choice is lost."
    rows = [row(1) | {f'val_load_{"a rather long name " * 9}{i}': [[i + 1, 1, 1, 1]] * 2 for i in range(60)}]
    names, load = viz.domain_load(rows[0], 1)
    assert (
        len(names) == len(set(names)) == len(load) == 12
        and names[-1] == '50 others'
        and max(map(len, names)) <= 24
    )
    assert load.sum() == sum(range(1, 61)) + 3 * 60 + 10 and to_png(experts_figure(rows))


@pytest.mark.parametrize(
    'damage',
    [
        dict(health={'max_load': [1.5, 1.2]}),
        dict(load=[[None, 1, 2, 3]] * 2),
        dict(load=[[-1, 1, 2, 3]] * 2),
        dict(load=[[1, 2, 3, 4]] * 3, health={}),
        dict(val_load_a=[[None, 1, 2, 3]] * 2),
        dict(val_ce=0, val_bpb=0),
        dict(load=None, health=None),
    ],
)
def test_a_figure_that_is_missing_or_none_costs_its_line(damage, tmp_path):
    "Also in the last line, which says what the watcher shows, and of which layer."
    for rows in ([*WHOLE[:4], row(5, **damage)], [row(1, **damage), *WHOLE[1:]]):
        run = run_of(tmp_path / 'run', rows, [text(4), text(5)])
        page = report(run)
        assert '<h2>Experts' in page and '<h2>Health' in page and '<h2>Text by expert' in page
        shown = json.loads(watching.Live(run).answer('board', -1)[1])
        assert (
            'MoE layer 1' in shown['svg'] and 'MoE layer 2' not in shown['svg'] and 'nan' not in shown['svg']
        )


def test_a_damaged_text_costs_itself_alone(tmp_path, capsys):
    """Of an evaluation of two texts the other stays, with its history.

    An expert that the log does not know is none.
    """
    lines = [text(step, name) for step in (3, 4, 5) for name in 'ab']
    lines[-1] = text(5, 'b', expert_ids=[[[0, 7]] * 6] * 2)
    run = run_of(
        tmp_path / 'run', WHOLE, [*lines, text(5, 'c', expert_ids=[[], []], gates=[], kept=[None] * 2)]
    )
    found = reports.read_samples(run)
    assert (
        found.steps == [3, 4, 5]
        and found.expert_ids.shape == (3, 2, 6, 2)
        and [line['domain'] for line in found.lines] == ['a']
    )
    assert 'samples.jsonl line 6 cannot be read' in capsys.readouterr().err
    (run / 'samples.jsonl').write_text(json.dumps(text(5) | {'gates': [[[float('nan')] * 2] * 6] * 2}) + '\n')
    assert reports.read_samples(run) is None


def test_a_page_says_which_folder_it_waits_for(tmp_path, capsys):
    run = tmp_path / '<b>later\x1b[31m'
    for make, words in ((lambda: None, 'which is not there'), (run.mkdir, 'to get its first line')):
        make()
        page = watching.Live(run).answer('', -1)[1]
        assert (
            f'waiting for {tmp_path}/&lt;b&gt;later\\x1b[31m' in page and words in page and '\x1b' not in page
        )
        with pytest.raises(BadInput, match=words):
            watching.Live(run).answer('board', -1)
    run_of(run, WHOLE)
    assert 'waiting for' not in watching.Live(run).answer('', -1)[1]
    with pytest.raises(BadInput, match='is a file'):
        watching.watch(run / 'log.jsonl', 0, False)


@pytest.mark.parametrize(
    'host, at', [('127.0.0.1', 'localhost'), ('127.0.0.2', '127.0.0.2'), ('::1', 'localhost')]
)
def test_a_watcher_says_how_to_reach_it(host, at, tmp_path, capsys, monkeypatch):
    "From another machine too, where nobody is logged in by name; where the usual port is taken, at the next."
    if host == '::1' and not socket.has_ipv6:
        pytest.skip('no IPv6 here')
    run = run_of(tmp_path / 'run', WHOLE)
    monkeypatch.setattr(
        watching.ThreadingHTTPServer, 'serve_forever', lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with watching.server_at(run, None, host) as first:
        watching.watch(run, None, False, host)
        port = int(capsys.readouterr().out.split('ssh -L ')[1].split(':')[0])
        assert 8712 <= first.server_port < port < 8732
    watching.watch(run, 0, False, host)
    said = capsys.readouterr().out
    port = said.split('ssh -L ')[1].split(':')[0]
    assert (
        f'at http://{at}:{port}/' in said.splitlines()[0]
        and f'ssh -L {port}:{at}:{port} {socket.gethostname()}' in said
    )


EVIL = [
    '\x1b[31mred\x07',
    '\u202egnp.exe',
    'a\0b\x85c',
    '<b>\x9b31m',
    '\x1b]0;title\x07',
    '\ud800',
    'line\u2028',
]


def test_nothing_that_a_terminal_or_a_page_obeys_is_shown_as_it_is(tmp_path, capsys):
    """Escapes, zeros, turns of direction and half characters are written out, in names of runs and domains
    and in texts.
    """
    run = run_of(
        tmp_path / 'run\x1b[31m',
        [
            row(s)
            | {
                f'val_{kind}_{name}': value
                for name in EVIL
                for kind, value in (('load', [[1, 2, 3, 4]] * 2), ('bpb', 2.0))
            }
            for s in (1, 2)
        ],
        [text(2, name, [*EVIL, '\t', '\n', '\r']) for name in EVIL],
    )
    live, board = watching.Live(run), svg_words(0, 0, ''.join(EVIL))
    shown = [
        report(run),
        live.answer('', -1)[1],
        *(
            part
            for kind in ('board', 'text')
            for part in map(str, json.loads(live.answer(kind, -1)[1]).values())
        ),
        board,
    ]
    watching.main(['experts', str(run), '--out', str(tmp_path / 'p\x1b[31m.png')])
    said = capsys.readouterr()
    for words in (*shown, said.out):
        assert not any(ch in words for ch in '\x1b\x07\0\x85\x9b\u202e\u2028\ud800\r'), words[:200]
    assert (
        '\\x1b[31mred\\x07' in shown[0]
        and '\\x1b' in said.out
        and 'a\u200d\u00a0é日' == viz.escape_controls('a\u200d\u00a0é日')
    )


def test_domains_whose_short_names_are_alike_stay_apart():
    rows = [
        row(1)
        | {
            f'val_load_{"the same beginning "}{middle}{" the same end"}': [[1, 2, 3, n]] * 2
            for n, middle in enumerate('xyz')
        }
    ]
    names, load = viz.domain_load(rows[0], 0)
    assert len(names) == 4 and load[1:, 3].tolist() == [0, 1, 2] and to_png(experts_figure(rows))


def test_many_domains_are_folded_in_the_figures_of_a_run():
    figures = {f'val_bpb_{n}': 2.0 for n in range(40)}
    assert '<details><summary>validation: 40 domains' in reports.facts(
        [row(1) | figures], {}
    ) and '<details' not in reports.facts([row(1, val_bpb_a=1.0)], {})


def test_one_step_out_of_line_costs_itself(tmp_path, capsys):
    for odd in (1, 999_999):
        rows = [row(s) for s in range(1, 41)]
        rows[28] = row(odd)
        run = run_of(tmp_path / str(odd), rows)
        assert [r['step'] for r in read_rows(run / 'log.jsonl')] == [s for s in range(1, 41) if s != 29]
        assert '1 lines are left out' in capsys.readouterr().err


def test_a_watcher_needs_an_address(tmp_path):
    with pytest.raises(BadInput, match='host must be an address or a name'):
        server(run_of(tmp_path / 'run', WHOLE), 0, '')


def test_a_board_outside_a_notebook_draws_nothing():
    board = boards.Board()
    for row in WHOLE:
        board.update(row)
    board.draw()
    assert board.handle is None and len(board.rows) == len(WHOLE)


def in_order(rows: list[dict]) -> list[dict]:
    """The plain reading of a log: rows in order of step.

    Left out are single rows out of line, and rows that a later row of the same or an earlier step replaces.
    """
    steps, out = [row['step'] for row in rows], []
    lone = {i for i, (a, b, c) in enumerate(zip(steps, steps[1:], steps[2:]), 1) if a < c and not a < b < c}
    for row in (row for i, row in enumerate(rows) if i not in lone):
        while out and out[-1]['step'] >= row['step']:
            out.pop()
        out.append(row)
    return out


def lines_of(rows) -> str:
    return ''.join(json.dumps(row) + '\n' for row in rows)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 200))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_short_log_is_read_as_it_is_in_whatever_parts_it_comes(tmp_path, steps, size):
    "Half lines, steps that repeat or go back, single steps out of line: as in the plain reading."
    rows = [dict(step=step, ce=float(i), val_ce=1.0) | dict(load=[[i, 1]]) for i, step in enumerate(steps)]
    path, content = tmp_path / 'log.jsonl', lines_of(rows)
    path.unlink(missing_ok=True)
    history = History(path)
    for end in range(size, len(content) + size, size):
        with open(path, 'a') as f:
            f.write(content[end - size : end])
        history.read()
    assert history.rows() == in_order(rows) == history.recent()


@pytest.mark.parametrize('n', [512, 513, 1024, 1500, 40_000])
def test_a_long_log_has_a_bounded_number_of_points(n, tmp_path):
    "Sums and extremes stay exact where all lines are parsed; the last lines are there as they are."
    run = run_of(tmp_path / 'run', [], settings=dict(max_iters=n, dataset='gone', n_experts=2))
    losses = np.random.default_rng(0).normal(2, 0.1, n)
    losses[n // 3] = 9.0  # a spike that a mean would hide
    rows = [dict(step=i + 1, ce=ce, load=[[1, 3]], tokens=i) for i, ce in enumerate(losses)]
    for row in rows[:: n // 300]:
        row['val_ce'] = row['val_bpb'] = 1 + abs(row['step'] / n - 0.4)
    (run / 'log.jsonl').write_text(lines_of(rows))
    history = History(run / 'log.jsonl')
    history.read()
    merged = history.rows()
    assert len(merged) <= 512 + 1 + 128 + 1 and history.recent() == rows[-64:] and len(merged) >= 256
    assert [r['step'] for r in merged] == sorted({r['step'] for r in merged}) and merged[-1]['step'] == n
    evaluated = [row for row in rows if 'val_ce' in row]
    best = min(evaluated, key=lambda row: row['val_ce'])
    assert min(viz.finite(merged, 'val_ce'), key=lambda row: row['val_ce'])['step'] == best['step']
    assert viz.finite(merged, 'val_ce')[-1]['step'] == evaluated[-1]['step']
    if n <= MOST_PARSED:
        assert sum(row['load'][0][1] for row in viz.routed_rows(merged)) == 3 * n
        assert max(max(row.get('range', {}).get('ce', [row['ce']])) for row in viz.finite(merged, 'ce')) == 9
    svg = json.loads(watching.Live(run).answer('board', -1)[1])['svg']
    assert len(svg) < 90_000 and 'nan' not in svg


def test_a_live_page_survives_what_happens_to_a_log(tmp_path):
    "New lines, half a line, a shortened log, a replaced one, a run that starts again, none, another."
    run = run_of(tmp_path / 'run', WHOLE[:3])
    live, log = watching.Live(run), run / 'log.jsonl'

    def shown():
        return json.loads(live.answer('board', -1)[1])['step'], [r['step'] for r in live.history.rows()]

    assert shown() == (3, [1, 2, 3])
    with open(log, 'a') as f:
        f.write(lines_of([row(4)]) + lines_of([row(5)])[:20])
    assert shown() == (4, [1, 2, 3, 4])
    with open(log, 'a') as f:
        f.write(lines_of([row(5)])[20:])
    assert shown() == (5, [1, 2, 3, 4, 5])
    log.write_text(lines_of(WHOLE[:2]))  # shortened in place
    assert shown() == (2, [1, 2])
    (tmp_path / 'new').write_text(lines_of([row(s, ce=1.0) for s in (1, 2, 3)]))
    (tmp_path / 'new').replace(log)  # replaced, with other lines
    assert shown() == (3, [1, 2, 3]) and live.history.rows()[0]['ce'] == 1.0
    with open(log, 'a') as f:
        f.write(lines_of([row(2), row(3), row(4)]))  # the run started again at 2, in the same file
    assert shown() == (4, [1, 2, 3, 4])
    log.rename(run / 'log.1')
    with pytest.raises(BadInput, match='waiting for'):
        live.answer('board', -1)
    log.write_text(lines_of([row(1)]))
    assert shown() == (1, [1])


def synthetic(n: int = 200, seed: int = 0, **columns) -> list[dict]:
    "The log of a healthy run with noise; a column is a function of the line's number and a generator."
    rng = np.random.default_rng(seed)
    usual = dict(
        ce=lambda i: 1.5 + 3 * 0.98**i + rng.normal(0, 0.1),
        load=lambda i: rng.multinomial(512, [1 / 8] * 8, 2).tolist(),
        drop_rate=lambda i: abs(rng.normal(0.05, 0.01)),
        spikes=lambda i: i // 80,
        tok_per_s=lambda i: rng.normal(1000, 50),
        val_ce=lambda i: 1.6 + 3 * 0.98**i + rng.normal(0, 0.005),
    )
    return [
        dict(step=10 * (i + 1), tokens=5120 * (i + 1), skipped=0)
        | {key: figure(i) for key, figure in (usual | columns).items()}
        for i in range(n)
    ]


VERDICTS = {
    'Finished, healthy': {},
    'Experts unused': dict(load=lambda i: [[128] * 8, [512, 510] + [0, 1] * 3]),
    'Diverging': dict(ce=lambda i: 2 + max(0, i - 170) / 20 + i % 3 / 10),
    'Dropping many tokens': dict(drop_rate=lambda i: 0.1 + i / 1000),
    'Loss spikes': dict(spikes=lambda i: i // 9),
    'Overfitting': dict(val_ce=lambda i: 2 + abs(i - 100) / 200),
}


@pytest.mark.parametrize('title', VERDICTS)
def test_page_report_and_list_begin_with_the_verdict(title, tmp_path):
    setup = dict(max_iters=2000, dataset='gone', n_experts=8)
    run = run_of(tmp_path / 'out' / 'run', synthetic(**VERDICTS[title]), settings=setup)
    mark = '✓ ' if title == 'Finished, healthy' else '✗ '
    page = json.loads(watching.Live(run).answer('board', -1)[1])['verdict']
    assert page.split('<b>')[1].startswith(mark + title)
    assert report(run).split('<b>')[1].startswith(mark + title)
    listed = watching.Viewer(tmp_path / 'out').answer('/list', -1)[1]
    assert title in listed and ('run verdict well' in listed) == (mark == '✓ ')


def test_a_run_without_new_lines_is_stalled_even_while_nobody_looks(tmp_path):
    "The page is told although no line has come; the report names it too."
    run = run_of(tmp_path / 'run', synthetic(), settings=dict(max_iters=9000, dataset='gone', n_experts=8))
    live = watching.Live(run)
    now = json.loads(live.answer('board', -1)[1])
    assert '✓ Healthy' in now['verdict'] and live.answer('board', 2000, now['state']) is None
    os.utime(run / 'log.jsonl', (time.time() - 7200,) * 2)
    told = json.loads(live.answer('board', 2000, now['state'])[1])
    assert told['state'] != now['state'] and 'No new line for 2 h' in told['verdict']
    assert live.answer('board', 2000, told['state']) is None and 'Stalled or stopped' in report(run)


def test_a_healthy_log_is_not_called_ill():
    "Noise of 50 runs, at each length that a page could show: no limit is reached by chance."
    for seed in range(50):
        rows = synthetic(seed=seed)
        for n in range(5, 201, 15):
            found = diagnose(rows[:n], rows[max(0, n - 64) : n], 2000, 1.0)
            assert not any(finding.ill for finding in found), (seed, n, found)


def test_a_folder_of_runs_is_a_list_of_links(tmp_path):
    "Each run with its own page; odd names are escaped; no address leads out of the folder."
    out = tmp_path / 'out'
    run_of(out / 'good', WHOLE, [text(5)])
    run_of(out / 'sub' / 'deep', WHOLE[:2])
    run_of(out / '<b>odd & "x"#?%', WHOLE[:4])
    run_of(out / 'broken', WHOLE)
    (out / 'broken' / 'config.json').write_text('{')
    run_of(tmp_path / 'secret', WHOLE)
    viewer = watching.Viewer(out)
    kind, whole = viewer.answer('/', -1)
    assert kind == 'text/html' and '<b>odd' not in whole and '&lt;b&gt;odd &amp; &#34;x&#34;#?%' in whole
    addresses = re.findall(r'href="([^"]+)"', whole)
    assert len(addresses) == 4 and 'sub/deep/' in addresses
    steps = [json.loads(viewer.answer(f'/{a}board', -1)[1])['step'] for a in addresses if 'broken' not in a]
    assert sorted(steps) == [2, 4, 5] and 'is not the config.json of a run' in whole
    assert 'href="../../">all runs' in viewer.answer('/sub/deep/', -1)[1]
    for address in (
        '/../secret/board',
        '/%2e%2e/secret/board',
        '/sub/',
        '/good/log.jsonl',
        '/board',
        '/text',
    ):
        with pytest.raises(LookupError):
            viewer.answer(address, -1)
    with server(out) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        connection = http_client(http.server_port)
        statuses = {}
        for address in ('/', '/list', '/good/', '/good/text', '/../secret/board', '/%00/board', '/nothing/'):
            connection = http_client(http.server_port)
            connection.request('GET', address)
            statuses[address] = connection.getresponse().status
        assert [*statuses.values()] == [200] * 4 + [404] * 3
        http.shutdown()


def test_a_run_is_compared_with_the_one_before_it(tmp_path):
    setup = dict(max_iters=9, dataset='gone', n_experts=4, top_k=1)
    for i, (name, dataset) in enumerate(
        {'first': 'gone', 'second': 'gone', 'other': 'else', 'new': 'gone'}.items()
    ):
        run = run_of(tmp_path / name, WHOLE, settings=setup | dict(dataset=dataset, top_k=i))
        os.utime(run / 'log.jsonl', (1e9 + i,) * 2)
    assert reports.earlier_run(tmp_path / 'new').name == 'second'
    assert reports.earlier_run(tmp_path / 'first') is None
    page = report(tmp_path / 'new')
    board = json.loads(watching.Live(tmp_path / 'new').answer('board', -1)[1])['svg']
    assert 'Earlier run: second. This run has top_k 3 (was 1).' in page and '— second' in board
