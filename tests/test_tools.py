"""Tests tools/cuda.py on a CPU (`--dry`)."""
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = 'tests data layer step target pretrain muon memory ladder write'.split()


def cuda(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT/'tools'/'cuda.py', *map(str, words)], capture_output=True, text=True, cwd=ROOT)


def test_every_section_runs(tmp_path):
    done = cuda('--dry', '--out', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path/'dry-cpu.json').read_text())
    assert list(found['sections']) == SECTIONS and {'torch', 'commit', 'date', 'command'} <= found['machine'].keys()
    for name, section in found['sections'].items():
        assert section['result'] == 'passed' and section['headline'] in done.stdout and section['command'], name
        assert section['rows'] or name in ('tests', 'pretrain')
    assert '<h2>Experts</h2>' in (tmp_path/'report.html').read_text()
    assert done.stdout.splitlines()[-len(SECTIONS) - 2].split() == ['section', 'result', 'seconds', 'headline']


def test_a_failure_costs_one_section(tmp_path):
    "A failed section reports its error; later sections run, earlier results are kept."
    (tmp_path/'dry-cpu.json').write_text(json.dumps({'sections': {'step': {'result': 'passed'}}}))
    done = cuda('--dry', '--out', tmp_path, '--only=layer,memory', '--against=nowhere')
    found = json.loads((tmp_path/'dry-cpu.json').read_text())['sections']
    assert done.returncode == 1 and {name: section['result'] for name, section in found.items()} == {
        'step': 'passed', 'layer': 'failed', 'memory': 'passed'}
    assert 'against must be a folder with the model.py and manager.py of nanoMoE, got ' in found['layer']['headline']


def test_a_section_past_its_limit_leaves_what_it_had_and_no_process(tmp_path):
    "The trainer that torchrun starts has a session of its own; it is ended too."
    program = (ROOT/'tools'/'cuda.py').read_text().replace("'pretrain': (4, pretrain)", "'pretrain': (0.13, pretrain)")
    program = program.replace("    run('trial', 10 if dry else 40)", "    note(given, headline='', rows=[], before=1)\n    run('trial', 10**6)")
    program = program.replace('Path(__file__).resolve().parents[1]', f'Path({str(ROOT)!r})')
    (tmp_path/'slow.py').write_text(program)
    assert cuda('--dry', '--out', tmp_path, '--only=data').returncode == 0
    done = subprocess.run([sys.executable, tmp_path/'slow.py', '--dry', '--out', tmp_path, '--only=pretrain'], capture_output=True, text=True)
    found = json.loads((tmp_path/'dry-cpu.json').read_text())['sections']['pretrain']
    assert done.returncode == 1 and found['result'] == 'timed out' and found['before'] == 1 and (tmp_path/'pretrain.log').exists()
    still = [p for p in Path('/proc').glob('[0-9]*/cmdline') if str(tmp_path).encode() in p.read_bytes()] if Path('/proc/self').exists() else []
    assert not still


def test_bad_input_is_one_sentence(tmp_path):
    for words, sentence in ((['--only=layers'], 'there is no section layers'), (['--dry', f'--wheels={tmp_path}'], 'holds no wheels'),
                            (['--only=muon'], 'has no CUDA GPU') if not torch.cuda.is_available() else (['--only='], 'no section')):
        done = cuda(*words)
        assert done.returncode == 2 and sentence in done.stderr.splitlines()[-1]
