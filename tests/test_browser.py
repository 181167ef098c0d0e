"""JupyterLab in a real browser: notebooks run from top to bottom, and a slider changes its picture."""
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which('chromium')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no chromium on the PATH')

NOTEBOOK = 'window.jupyterapp?.shell.currentWidget'
KERNEL = f'{NOTEBOOK}?.sessionContext?.session?.kernel'
CELLS = f'({NOTEBOOK}?.content?.model?.sharedModel?.cells ?? []).filter(c => c.cell_type === "code" && c.source.trim())'
IDLE_AFTER = f'''() => {{ if ({KERNEL}?.connectionStatus !== 'connected' || {KERNEL}?.status !== 'idle') return null
                          const cells = {CELLS}, ran = cells.filter(c => c.execution_count).length
                          return cells.length && ran === cells.length ? 'all' : ran }}'''
ERRORS = f'() => {CELLS}.flatMap(c => c.outputs.filter(o => o.output_type === "error").map(o => `${{c.id}}: ${{o.evalue}}`))'


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab that serves a copy of the project, and the folder it may write to."
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', folder/'nbs')
    for name in ('settings.ini', 'nanomoe', 'tests', 'assets'): os.symlink(ROOT/name, folder/name)
    os.symlink(ROOT/'data', folder/'data')
    quiet = folder/'settings'/'@jupyterlab'/'apputils-extension'
    quiet.mkdir(parents=True)
    (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    places = {f'JUPYTER_{name}_DIR': str(folder/name.lower()) for name in ('CONFIG', 'RUNTIME')}
    places |= {'JUPYTERLAB_SETTINGS_DIR': str(folder/'settings'),
               'JUPYTERLAB_WORKSPACES_DIR': str(folder/'workspaces'), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--allow-root', '--ip=127.0.0.1',
               f'--port={port}', f'--IdentityProvider.token={token}', '--ServerApp.port_retries=0',
               '--LabApp.expose_app_in_browser=True', f'--ServerApp.root_dir={folder}']
    with open(folder/'lab.log', 'w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **places})
    try:
        wait_until_up(f'http://127.0.0.1:{port}/api/status?token={token}')
        yield f'http://127.0.0.1:{port}/lab/workspaces/{{0}}/tree/nbs/{{0}}.ipynb?token={token}', folder
    finally:
        server.terminate()
        server.wait(30)


def wait_until_up(url: str):
    for _ in range(240):
        try: return urllib.request.urlopen(url, timeout=1)
        except OSError: time.sleep(0.25)
    raise TimeoutError('JupyterLab did not start')


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM,
                                     args=['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu'])
        yield chromium
        chromium.close()


def run_all(page, url: str):
    """Open a notebook and run all of its cells, in order, as the menu's Run All Cells does.

    On a busy machine JupyterLab may lose a new kernel from sight: it then asks which one to start, or drops what
    was to run. So the question is answered, and where nothing goes on, Run All is asked for again.
    """
    page.goto(url)
    page.wait_for_selector('.jp-NotebookPanel .jp-Cell', timeout=60_000)
    before, deadline = None, time.monotonic() + 300
    while time.monotonic() < deadline:
        if page.locator('.jp-Dialog').count():
            page.locator('.jp-Dialog select').select_option(label='Python 3 (ipykernel)')
            page.locator('.jp-Dialog .jp-mod-accept').click()
        now = page.evaluate(IDLE_AFTER)
        if now == 'all': return
        if now is not None and now == before:                           # idle, and no cell more than a while ago
            page.evaluate('() => { window.jupyterapp.commands.execute("notebook:run-all-cells") }')
        before = now
        time.sleep(3)
    raise TimeoutError(f'{url} did not run to its end')


@pytest.mark.parametrize('notebook', ['04_viz', '12_train'])
def test_run_all_and_move_a_slider(lab, browser, notebook):
    url, folder = lab
    page = browser.new_page(viewport={'width': 1280, 'height': 1000})
    run_all(page, url.format(notebook))
    assert page.evaluate(ERRORS) == []
    handle = scroll_to_slider(page)
    image = handle.locator('xpath=ancestor::*[contains(@class, "widget-vbox")][1]//img').first
    picture = lambda: hashlib.sha256(image.get_attribute('src').encode()).hexdigest()
    before = picture()
    page.screenshot(path=folder/f'{notebook}-before.png')
    handle.focus()
    for _ in range(3): page.keyboard.press('ArrowRight')
    for _ in range(200):
        if picture() != before: break
        time.sleep(0.1)
    page.screenshot(path=folder/f'{notebook}-after.png')
    keep_screenshots(folder)
    assert picture() != before
    page.close()


def scroll_to_slider(page):
    "The handle of the notebook's first slider; JupyterLab draws a cell only when it is near the screen."
    count = page.evaluate('() => window.jupyterapp.shell.currentWidget.content.widgets.length')
    for i in range(count):
        page.evaluate(f'''async () => {{ const notebook = window.jupyterapp.shell.currentWidget.content
                                         notebook.activeCellIndex = {i}
                                         await notebook.scrollToItem({i}) }}''')
        handle = page.locator('.noUi-handle').first
        if handle.count():
            handle.scroll_into_view_if_needed()
            return handle
    raise AssertionError('the notebook shows no slider')


def keep_screenshots(folder: Path):
    "Copy the screenshots to where NANOMOE_SCREENSHOTS says, if it says so, to be looked at."
    if target := os.environ.get('NANOMOE_SCREENSHOTS'):
        Path(target).mkdir(parents=True, exist_ok=True)
        for path in folder.glob('*.png'): shutil.copy(path, target)
