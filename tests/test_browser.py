"""JupyterLab in a real browser: notebooks run from top to bottom, explorers answer to keyboard and mouse.

Screenshots stay in out/screenshots. `--every-notebook` takes all notebooks in place of a chosen half.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / 'out' / 'screenshots'
NOTEBOOKS = sorted(path.stem for path in (ROOT / 'nbs').glob('*.ipynb'))
CHOSEN = {'01_router', '41_upcycle', '04_capacity', '02_experts', '03_losses', '45_report'}

NOTEBOOK = 'window.jupyterapp?.shell.currentWidget'
KERNEL = f'{NOTEBOOK}?.sessionContext?.session?.kernel'
CELLS = (
    f'({NOTEBOOK}?.content?.model?.sharedModel?.cells ?? []).filter(c => c.cell_type === "code" && '
    'c.source.trim())'
)
IDLE_AFTER = f'''() => {{ if ({KERNEL}?.connectionStatus !== 'connected') return null
                          if ({KERNEL}?.status !== 'idle') return null
                          const cells = {CELLS}, ran = cells.filter(c => c.execution_count).length
                          return cells.length && ran === cells.length ? 'all' : ran }}'''
ERRORS = (
    f'() => {CELLS}.flatMap(c => c.outputs.filter(o => o.output_type === "error").map(o => '
    f'`${{c.id}}: ${{o.evalue}}`))'
)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab that serves a copy of the project, with a place for the notebook's name."
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT / 'nbs', folder / 'nbs')
    for name in ('settings.ini', 'nanomoe', 'tests', 'assets'):
        os.symlink(ROOT / name, folder / name)
    os.symlink(ROOT / 'data', folder / 'data')
    quiet = folder / 'settings' / '@jupyterlab' / 'apputils-extension'
    quiet.mkdir(parents=True)
    (quiet / 'notification.jupyterlab-settings').write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    places = {f'JUPYTER_{name}_DIR': str(folder / name.lower()) for name in ('CONFIG', 'RUNTIME')}
    places |= {
        'JUPYTERLAB_SETTINGS_DIR': str(folder / 'settings'),
        'JUPYTERLAB_WORKSPACES_DIR': str(folder / 'workspaces'),
        'OMP_NUM_THREADS': '1',
    }
    command = [
        sys.executable,
        '-m',
        'jupyter',
        'lab',
        '--no-browser',
        '--allow-root',
        '--ip=127.0.0.1',
        f'--port={port}',
        f'--IdentityProvider.token={token}',
        '--ServerApp.port_retries=0',
        '--LabApp.expose_app_in_browser=True',
        f'--ServerApp.root_dir={folder}',
    ]
    with open(folder / 'lab.log', 'w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **places})
    try:
        wait_until_up(f'http://127.0.0.1:{port}/api/status?token={token}')
        yield f'http://127.0.0.1:{port}/lab/workspaces/{{0}}/tree/nbs/{{0}}.ipynb?token={token}'
    finally:
        server.terminate()
        server.wait(30)


def wait_until_up(url: str):
    for _ in range(240):
        try:
            return urllib.request.urlopen(url, timeout=1)
        except OSError:
            time.sleep(0.25)
    raise TimeoutError('JupyterLab did not start')


def run_all(page, url: str):
    """Open a notebook and run all of its cells, in order, as the menu's Run All Cells does.

    On a busy machine JupyterLab may lose a new kernel from sight: it then asks which one to start, or drops
    what was to run. So the question is answered, and where nothing goes on, Run All is asked for again.
    """
    page.goto(url)
    page.wait_for_selector('.jp-NotebookPanel .jp-Cell', timeout=60_000)
    before, since, deadline = None, time.monotonic(), time.monotonic() + 300
    while time.monotonic() < deadline:
        if page.locator('.jp-Dialog').count():
            page.locator('.jp-Dialog select').select_option(label='Python 3 (ipykernel)')
            page.locator('.jp-Dialog .jp-mod-accept').click()
        now = page.evaluate(IDLE_AFTER)
        if now == 'all':
            return
        if now is None or now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > 2:  # idle, and no cell more than a while ago
            page.evaluate('() => { window.jupyterapp.commands.execute("notebook:run-all-cells") }')
            since = time.monotonic()
        time.sleep(0.25)
    raise TimeoutError(f'{url} did not run to its end')


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_run_all_and_touch_every_explorer(browser, lab, notebook, request):
    if notebook not in CHOSEN and not request.config.getoption('--every-notebook'):
        pytest.skip('not in the chosen half')
    page = browser.new_page(viewport={'width': 1280, 'height': 1000})
    run_all(page, lab.format(notebook))
    assert page.evaluate(ERRORS) == []
    explorers = page.evaluate(EXPLORERS)
    assert explorers or not '00' <= notebook[:2] < '30'
    for i, index in enumerate(explorers):
        cell = scroll_to(page, index)
        shot = lambda what: page.screenshot(path=SHOTS / f'{notebook}-{i}-{what}.png')
        shot('before')
        for way in (by_keyboard, by_mouse):
            before = seen(cell)
            way(page, cell)
            wait_for(
                lambda: seen(cell) != before, f'{notebook}, explorer {i}: {way.__name__} changed nothing'
            )
            wait_for(
                lambda: page.evaluate(f'() => {KERNEL}.status') == 'idle',
                f'{notebook}: the kernel never rests',
            )
        shot('after')
    page.evaluate(
        '() => window.jupyterapp.commands.execute("apputils:change-theme", {theme: "JupyterLab Dark"})'
    )
    page.wait_for_selector('body[data-jp-theme-light="false"]', state='attached')
    for index in explorers[:1]:
        scroll_to(page, index)
    page.screenshot(path=SHOTS / f'{notebook}-dark.png')
    page.evaluate(
        '() => window.jupyterapp.commands.execute("apputils:change-theme", {theme: "JupyterLab Light"})'
    )
    page.evaluate(f'() => {NOTEBOOK}.sessionContext.shutdown()')
    page.close()


EXPLORERS = f'''() => {NOTEBOOK}.content.widgets.map((w, i) => [w.model.sharedModel, i])
                  .filter(([m, i]) => m.cell_type === 'code' && /^(box = |.* = )?explore\\(/m.test(m.source))
                  .map(([m, i]) => i)'''


def scroll_to(page, index: int):
    """The cell at a place in the notebook, brought into view.

    JupyterLab draws a cell only when it is near the screen.
    """
    page.evaluate(f'''async () => {{ const notebook = {NOTEBOOK}.content
                                     notebook.activeCellIndex = {index}
                                     await notebook.scrollToItem({index}, 'center') }}''')
    cell = page.locator(f'.jp-Cell[data-windowed-list-index="{index}"]')
    cell.locator('.widget-vbox').first.wait_for()
    cell.locator('.widget-vbox').first.scroll_into_view_if_needed()
    return cell


def seen(cell) -> str:
    "What an explorer shows: the address of its picture, which is new for each, or its HTML."
    picture = cell.locator('img.widget-image, .widget-html-content').first
    return picture.evaluate('e => e.src || e.innerHTML')


def by_keyboard(page, cell):
    "Move the first slider by three steps, from its end back if it is there."
    handle = cell.locator('.noUi-handle').first
    handle.focus()
    at_end = handle.get_attribute('aria-valuenow') == handle.get_attribute('aria-valuemax')
    for _ in range(3):
        page.keyboard.press('ArrowLeft' if at_end else 'ArrowRight')


def by_mouse(page, cell):
    "Drag the first slider to the far end of its track."
    track, option = (cell.locator(part).first.bounding_box() for part in ('.noUi-base', '.noUi-handle'))
    x, y = option['x'] + option['width'] / 2, option['y'] + option['height'] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(
        track['x'] + track['width'] * (0.05 if x > track['x'] + track['width'] / 2 else 0.95), y, steps=8
    )
    page.mouse.up()


def wait_for(fact, otherwise: str, seconds: float = 30):
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


OVERHANGING = (
    "() => [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right "
    "> innerWidth + .5).map(e => e.tagName)"
)


def test_watch_follows_a_run_in_the_browser(browser, tmp_path):
    """A run of two processes is watched while it goes on.

    The page keeps its last picture when the watcher ends.
    """
    run, quiet = tmp_path / 'run', dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    train = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            '-m',
            'nanomoe.train',
            'tiny',
            f'--out_dir={run}',
            '--max_iters=400',
            '--eval_interval=50',
            '--n_experts=8',
            '--block_size=96',
            '--device=cpu',
        ],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        **quiet,
    )
    run.mkdir(exist_ok=True)
    # also below `make test &`
    watch = subprocess.Popen(
        [sys.executable, '-m', 'nanomoe.viz', 'watch', run, '--port=0', '--open=False'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    (SHOTS / 'watch.png').unlink(missing_ok=True)
    page, errors, asked = browser.new_page(viewport={'width': 960, 'height': 700}), [], []
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('request', lambda r: asked.append((time.monotonic(), r.url)))
    try:
        page.goto(re.search(r'http://\S+', watch.stdout.readline())[0])
        steps = set()

        def step():
            return page.locator('#facts td').first.inner_text(timeout=60_000)

        while train.poll() is None:
            steps.add(step())
            if int(step().split()[0]) >= 250 and not (SHOTS / 'watch.png').exists():
                clip = dict(x=0, y=0, width=960, height=880)
                page.screenshot(path=SHOTS / 'watch.png', full_page=True, clip=clip)
            time.sleep(0.2)
        wait_for(lambda: step() == '400 of 400', 'the last step never came')
        wait_for(lambda: page.locator('#text pre').count() > 0, 'no text by expert')
        assert len(steps) >= 3, steps  # it moved while the run did
        assert all(f'MoE layer {i}' in page.locator('#board').inner_text() for i in (0, 1))
        assert 'Finished' in page.locator('#verdict').inner_text()
        page.set_viewport_size({'width': 360, 'height': 700})
        assert page.evaluate(OVERHANGING) == []
        watch.send_signal(signal.SIGINT)
        assert watch.wait(20) == 0
        wait_for(lambda: 'Viewer stopped' in page.locator('#state').inner_text(), 'silent about its end')
        assert page.locator('#board svg').count() == 11 and errors == []
        boards = [at for at, url in asked if '/board' in url]
        assert len(boards) / (boards[-1] - boards[0]) < 4  # questions a second
    finally:
        for process in (train, watch):
            process.kill()
        page.close()


def test_a_report_opens_from_disk(browser, tmp_path):
    "One page, no network: every picture is there, tabs change the text."
    run = tmp_path / 'run'
    subprocess.run(
        [
            sys.executable,
            '-m',
            'nanomoe.train',
            'tiny',
            f'--out_dir={run}',
            '--max_iters=200',
            '--n_experts=8',
            '--block_size=96',
            '--eval_interval=40',
            '--device=cpu',
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(
        [sys.executable, '-m', 'nanomoe.viz', 'report', run], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    shutil.move(run / 'report.html', tmp_path / 'elsewhere.html')
    shutil.rmtree(run)
    page, asked = browser.new_page(viewport={'width': 960, 'height': 1000}, color_scheme='dark'), []
    page.on('request', lambda r: asked.append(r.url))
    page.goto((tmp_path / 'elsewhere.html').as_uri())
    assert page.evaluate('() => [...document.images].every(image => image.naturalWidth > 0)')
    assert page.locator('img').count() >= 7
    first, second = page.locator('#text-pane-0'), page.locator('#text-pane-1')
    assert first.is_visible() and not second.is_visible()
    page.get_by_text('layer 1', exact=True).first.click()
    assert second.is_visible() and not first.is_visible()
    assert [url for url in asked if not url.startswith(('file:', 'data:'))] == []
    page.screenshot(path=SHOTS / 'report.png', full_page=True)
    page.set_viewport_size({'width': 360, 'height': 1000})
    assert page.evaluate(OVERHANGING) == []
    page.set_viewport_size({'width': 960, 'height': 1000})
    page.evaluate('() => scrollTo(0, 0)')
    top, end = (
        page.get_by_role('heading', name=name).bounding_box()['y']
        for name in ('Text by expert', 'Co-activation')
    )
    page.screenshot(
        path=SHOTS / 'report-text.png',
        full_page=True,
        clip=dict(x=0, y=top - 10, width=960, height=end - top),
    )
    page.close()
