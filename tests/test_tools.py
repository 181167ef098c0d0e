"""Tests tools/cuda.py on a CPU (`--dry`)."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = 'tests data layer step target pretrain muon memory ladder write'.split()


def cuda(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / 'tools' / 'cuda.py', *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_every_section_runs(tmp_path):
    done = cuda('--dry', '--out', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / 'dry-cpu.json').read_text())
    assert (
        list(found['sections']) == SECTIONS
        and {'torch', 'commit', 'date', 'command'} <= found['machine'].keys()
    )
    for name, section in found['sections'].items():
        assert section['result'] == 'passed' and section['headline'] in done.stdout and section['command'], (
            name
        )
        assert section['rows'] or name in ('tests', 'pretrain')
    assert '<h2>Experts</h2>' in (tmp_path / 'report.html').read_text()
    assert done.stdout.splitlines()[-len(SECTIONS) - 2].split() == [
        'section',
        'result',
        'seconds',
        'headline',
    ]


def test_a_failure_costs_one_section(tmp_path):
    "A failed section reports its error; later sections run, earlier results are kept."
    (tmp_path / 'dry-cpu.json').write_text(json.dumps({'sections': {'step': {'result': 'passed'}}}))
    done = cuda('--dry', '--out', tmp_path, '--only=layer,memory', '--against=nowhere')
    found = json.loads((tmp_path / 'dry-cpu.json').read_text())['sections']
    assert done.returncode == 1 and {name: section['result'] for name, section in found.items()} == {
        'step': 'passed',
        'layer': 'failed',
        'memory': 'passed',
    }
    assert (
        'against must be a folder with the model.py and manager.py of nanoMoE, got '
        in found['layer']['headline']
    )


def test_a_section_past_its_limit_leaves_what_it_had_and_no_process(tmp_path):
    "The trainer that torchrun starts has a session of its own; it is ended too."
    program = (
        (ROOT / 'tools' / 'cuda.py')
        .read_text()
        .replace("'pretrain': (4, pretrain)", "'pretrain': (0.13, pretrain)")
    )
    program = program.replace(
        "    run('trial', 10 if dry else 40)",
        "    note(given, headline='', rows=[], before=1)\n    run('trial', 10**6)",
    )
    program = program.replace('Path(__file__).resolve().parents[1]', f'Path({str(ROOT)!r})')
    (tmp_path / 'slow.py').write_text(program)
    assert cuda('--dry', '--out', tmp_path, '--only=data').returncode == 0
    done = subprocess.run(
        [sys.executable, tmp_path / 'slow.py', '--dry', '--out', tmp_path, '--only=pretrain'],
        capture_output=True,
        text=True,
    )
    found = json.loads((tmp_path / 'dry-cpu.json').read_text())['sections']['pretrain']
    assert (
        done.returncode == 1
        and found['result'] == 'timed out'
        and found['before'] == 1
        and (tmp_path / 'pretrain.log').exists()
    )
    still = (
        [p for p in Path('/proc').glob('[0-9]*/cmdline') if str(tmp_path).encode() in p.read_bytes()]
        if Path('/proc/self').exists()
        else []
    )
    assert not still


def test_bad_input_is_one_sentence(tmp_path):
    for words, sentence in (
        (['--only=layers'], 'there is no section layers'),
        (['--dry', f'--wheels={tmp_path}'], 'holds no wheels'),
        (['--only=muon'], 'has no CUDA GPU')
        if not torch.cuda.is_available()
        else (['--only='], 'no section'),
    ):
        done = cuda(*words)
        assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1]


def test_your_own_router_works_as_it_says(tmp_path):
    """The section is followed in a copy: a value in one notebook, a class and its name in another, two
    commands.
    """
    cells = json.loads((ROOT / 'nbs' / 'commands.ipynb').read_text())['cells']
    (section,) = [''.join(cell['source']) for cell in cells if cell['id'] == 'own-router']
    router, commands = re.findall(r'```\w+\n(.*?)```', section, re.DOTALL)
    for name in ('nbs', 'nanomoe', 'settings.ini', 'setup.py', 'README.md'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)

    def edit(notebook, cell, old, new):
        path = tmp_path / 'nbs' / notebook
        found = json.loads(path.read_text())
        cell = next(c for c in found['cells'] if c['id'] == cell)
        assert ''.join(cell['source']).count(old) == 1
        cell['source'] = ''.join(cell['source']).replace(old, new).splitlines(True)
        path.write_text(json.dumps(found))

    edit('30_config.ipynb', 'model-config', "'expert_choice', 'hash']", "'expert_choice', 'hash', 'cosine']")
    edit('01_router.ipynb', 'hash-router', 'def make_router', f'{router}\ndef make_router')
    edit(
        '01_router.ipynb', 'hash-router', "'hash': HashRouter}", "'hash': HashRouter, 'cosine': CosineRouter}"
    )
    for command in commands.splitlines():
        program, *words = command.split()
        program = [Path(sys.executable).with_name('nbdev_export')] if 'nbdev' in program else [sys.executable]
        words += ['--max_iters=2', '--device=cpu'] if words else []
        done = subprocess.run([*program, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / 'out' / 'cosine' / 'log.jsonl').read_text().splitlines()]
    assert rows[-1]['step'] == 2
    assert json.loads((tmp_path / 'out' / 'cosine' / 'config.json').read_text())['router'] == 'cosine'
    for words in (
        ['-m', 'nanomoe.train', '--help'],
        ['-m', 'nanomoe.sample', 'out/cosine', '--max_new_tokens=5'],
    ):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and ('cosine' in done.stdout or 'sample' in words[1]), done.stderr
