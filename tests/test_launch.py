"The launch recipes, as far as a machine without a cluster can try them: run with stand-ins for its commands."

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nanomoe import checkpoint
from nanomoe.metrics import read_log

LAUNCH = Path(__file__).resolve().parents[1] / 'launch'
TINY = (
    'tiny --max_iters=40 --eval_interval=20 --checkpoint_interval=100 --log_interval=1 --device=cpu'.split()
)


@pytest.mark.parametrize('path', sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_recipe_is_short(path):
    assert len(path.read_text().splitlines()) < 40


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    "The environment of a Slurm job on one node, where `srun` runs its command and `scontrol` takes notes."
    folder = tmp_path / 'bin'
    folder.mkdir()
    stand_ins = {
        'srun': 'exec "$@"',
        'scontrol': f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/notes',
        'torchrun': f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in stand_ins.items():
        (folder / name).write_text(f'#!/bin/bash\n{body}\n')
        (folder / name).chmod(0o755)
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    (tmp_path / '.venv' / 'bin' / 'activate').write_text('')
    slurm = dict(SUBMIT_DIR=tmp_path, JOB_NODELIST='localhost', NNODES=1, GPUS_ON_NODE=2, JOB_ID=7)
    return os.environ | {
        'PATH': f'{folder}:{os.environ["PATH"]}',
        'OMP_NUM_THREADS': '1',
        **{f'SLURM_{name}': str(value) for name, value in slurm.items()},
    }


def untimed(folder: Path) -> list[dict]:
    rows = read_log(folder / 'log.jsonl')
    return [{k: v for k, v in row.items() if k not in ('tok_per_s', 'mfu')} for row in rows]


@pytest.mark.parametrize(
    'options', [[], ['--expert_parallel=2', '--shard=True']], ids=['data parallel', 'spread and sharded']
)
def test_slurm_requeues_a_job_that_goes_on_bit_for_bit(cluster, tmp_path, options):
    def submit(name):
        command = ['bash', str(LAUNCH / 'slurm.sh'), *TINY, *options, f'--out_dir={tmp_path}/{name}']
        return subprocess.Popen(command, env=cluster, start_new_session=True)

    assert submit('whole').wait(200) == 0
    job = submit('run')
    while job.poll() is None and len(read_log(tmp_path / 'run' / 'log.jsonl')) < 7:
        time.sleep(0.005)
    job.send_signal(signal.SIGTERM)  # --signal=B:TERM@120
    assert job.wait(60) == 0
    assert (tmp_path / 'notes').read_text() == 'requeue 7\n'
    assert 7 <= checkpoint.load_latest(tmp_path / 'run').step < 40
    cluster['SLURM_RESTART_COUNT'] = '1'
    assert submit('run').wait(200) == 0
    assert (tmp_path / 'notes').read_text() == 'requeue 7\n'  # a finished run is not queued again
    assert untimed(tmp_path / 'run') == untimed(tmp_path / 'whole')


def test_slurm_asks_for_the_signal_that_the_script_waits_for():
    asked = dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?$', (LAUNCH / 'slurm.sh').read_text(), re.M))
    assert asked['signal'].startswith('B:TERM@') and 'requeue' in asked and asked['ntasks-per-node'] == '1'


def test_skypilot_runs_its_command(cluster, tmp_path):
    task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
    assert task['envs']['RUN'] and '~/runs' in task['file_mounts'] and task['resources']['use_spot']
    sky = dict(NUM_NODES='1', NUM_GPUS_PER_NODE='2', NODE_RANK='0', NODE_IPS='127.0.0.1')
    environment = cluster | {f'SKYPILOT_{k}': v for k, v in sky.items()} | {'HOME': str(tmp_path)}
    environment['RUN'] = ' '.join([*TINY, '--max_iters=4'])
    done = subprocess.run(
        ['bash', '-c', task['run']], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(read_log(tmp_path / 'runs' / 'nanomoe' / 'log.jsonl')) == 4


def test_the_dockerfile_copies_what_is_there():
    text = (LAUNCH / 'Dockerfile').read_text()
    copied = [name for line in re.findall(r'^COPY (.*) \S+$', text, re.M) for name in line.split()]
    assert {'nbs', 'setup.py', 'Makefile'} <= set(copied) and all(
        (LAUNCH.parent / n).exists() for n in copied
    )
    assert json.loads(re.search(r'^ENTRYPOINT (.*)$', text, re.M)[1])[-1] == 'nanomoe.train'
