"""Whole programs on one and on several processes: the same numbers, also after a stop."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanomoe import checkpoint, data
from nanomoe.corpora import numbers_documents
from nanomoe.dataset import TokenDataset

TINY = [
    '-m',
    'nanomoe.train',
    'tiny',
    '--max_iters=60',
    '--eval_interval=30',
    '--checkpoint_interval=30',
    '--log_interval=1',
    '--device=cpu',
]
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}


def lines_with(words: str, said: str) -> int:
    "How often a process said so; torchrun repeats it in its report."
    return sum(words in line and 'traceback :' not in line for line in said.splitlines())


def torchrun(*options):
    return [sys.executable, '-m', 'torch.distributed.run', *options]


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def largest_difference(a: list[dict], b: list[dict], name: str = 'ce') -> float:
    assert [row['step'] for row in a] == [row['step'] for row in b]
    return max(abs(x[name] - y[name]) for x, y in zip(a, b))


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> Path:
    "The run every other is compared with: `tiny` on one process, without a stop."
    folder = tmp_path_factory.mktemp('alone')
    run([sys.executable, *TINY, f'--out_dir={folder}'])
    return folder


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ('tok_per_s', 'mfu')} for row in rows]


def test_the_log_says_what_the_design_names(alone):
    rows = log(alone)
    fields = (
        'step tokens ce balance_loss z_loss load drop_rate entropy grad_norm lr tok_per_s mfu skipped'.split()
    )
    assert [row['step'] for row in rows] == list(range(1, 61))
    assert all(set(fields) <= row.keys() for row in rows)
    assert rows[0]['ce'] == pytest.approx(math.log(257), abs=0.05)  # a fresh model knows nothing
    assert rows[-1]['ce'] < rows[0]['ce'] - 1.5
    assert rows[-1]['tokens'] == 60 * 2 * 8 * 32
    assert all(sum(layer) == 2 * 8 * 32 * 2 for row in rows for layer in row['load'])  # N·K, none lost
    assert {'val_ce', 'val_bpb', 'val_ce_numbers', 'val_load_numbers'} <= rows[-1].keys()
    samples = [json.loads(line) for line in (alone / 'samples.jsonl').read_text().splitlines()]
    assert {row['step'] for row in samples} == {30, 60}
    assert all(
        len(s['pieces']) == len(s['ids']) == len(s['expert_ids'][0]) == len(s['gates'][0]) for s in samples
    )


def test_two_processes_are_one(alone, tmp_path):
    run(torchrun('--standalone', '--nproc_per_node=2', *TINY, f'--out_dir={tmp_path}'))
    difference = largest_difference(log(alone), log(tmp_path))
    print(f'largest difference in ce over 60 steps: {difference:.1e}')
    assert difference <= 1e-5
    assert abs(log(alone)[-1]['val_ce'] - log(tmp_path)[-1]['val_ce']) <= 1e-5


def test_two_nodes_are_one(alone, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    node = torchrun(
        '--nnodes=2',
        '--nproc_per_node=1',
        '--rdzv_backend=c10d',
        f'--rdzv_endpoint=127.0.0.1:{port}',
        '--rdzv_id=tiny',
        '--local_addr=127.0.0.1',
        *TINY,
        f'--out_dir={tmp_path}',
    )
    agents = [
        subprocess.Popen(node, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert largest_difference(log(alone), log(tmp_path)) <= 1e-5


def wait_for_step(folder: Path, step: int):
    "Until a run has logged `step`."
    for _ in range(1200):
        path = folder / 'log.jsonl'
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f'{folder} did not reach step {step}')


@pytest.mark.parametrize('stop', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_a_stopped_run_continues_bit_for_bit(alone, tmp_path, stop):
    command = [sys.executable, *TINY, f'--out_dir={tmp_path}']
    stopped = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 7)
    stopped.send_signal(stop)
    said = stopped.communicate(timeout=60)[0]
    step = log(tmp_path)[-1]['step']
    assert 7 <= step < 60 and f'stopped after step {step}' in said
    assert stopped.returncode == 130
    assert (tmp_path / f'step-{step:08d}' / 'meta.json').exists()
    run(command)
    assert untimed(log(tmp_path)) == untimed(log(alone))
    weights = [load_file(folder / 'step-00000060' / 'model.safetensors') for folder in (alone, tmp_path)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_a_stop_leaves_no_trace_in_the_log(alone, tmp_path):
    "Lines at the usual steps only, although it stopped and began again between them."
    command = [sys.executable, *TINY, '--log_interval=7', f'--out_dir={tmp_path}']
    stopped = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
    wait_for_step(tmp_path, 2)  # two lines: steps 1 and 7
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=60)
    run(command)
    usual = [
        row for row in log(alone) if row['step'] in (1, 60) or row['step'] % 7 == 0 or row['step'] % 30 == 0
    ]
    assert untimed(log(tmp_path)) == untimed(usual)


def test_another_shape_or_other_data_do_not_continue_a_run(alone, tmp_path):
    data.write_dataset(numbers_documents(20_000, seed=1), tmp_path / 'other', 'bytes')
    for change, sentence in (
        ('--n_embd=16', 'holds a run with n_embd=32 (asked for 16)'),
        ('--top_k=1', 'top_k=2 (asked for 1)'),
        ('--optimizer=muon', 'optimizer=adamw (asked for muon)'),
        ('--seed=1', 'seed=1337 (asked for 1)'),
        (f'--dataset={tmp_path}/other', f'holds a run on other data than {tmp_path}/other'),
        ('--batch_size=4', 'batch_size * gradient_accumulation_steps = 16 (asked for 8)'),
    ):
        done = subprocess.run(
            [sys.executable, *TINY, f'--out_dir={alone}', change],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1


def test_routing_may_change_in_mid_run_where_it_is_named(alone, tmp_path):
    shutil.copytree(alone, tmp_path / 'run')
    command = [sys.executable, *TINY, f'--out_dir={tmp_path}/run', '--top_k=1', '--max_iters=62']
    run([*command, '--allow_changed=top_k'])
    assert [sum(log(tmp_path / 'run')[i]['load'][0]) for i in (59, 60, 61)] == [1024, 512, 512]  # N·K
    done = subprocess.run(
        [*command, '--allow_changed=n_embd'], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and 'allow_changed must name some of top_k, norm_topk_prob' in done.stderr


def test_global_balance_is_that_of_the_joint_batch(tmp_path):
    "Two processes with half a batch each, statistics over both: the run of one process with the whole batch."
    both = ['--balance_over=global', '--aux_loss_weight=1', '--capacity_factor=None']
    whole = ['--batch_size=16', '--gradient_accumulation_steps=1', f'--out_dir={tmp_path}/whole']
    run([sys.executable, *TINY, *both, *whole])
    run(torchrun('--standalone', '--nproc_per_node=2', *TINY, *both, f'--out_dir={tmp_path}/halves'))
    run([sys.executable, *TINY, *both, f'--out_dir={tmp_path}/in_turn'])  # accumulated, with a pass ahead
    for name in ('ce', 'balance_loss', 'grad_norm'):
        assert largest_difference(log(tmp_path / 'in_turn'), log(tmp_path / 'halves'), name) <= 1e-6, name
    for name in ('ce', 'balance_loss'):  # balance is logged as the mean of two halves
        assert largest_difference(log(tmp_path / 'whole'), log(tmp_path / 'halves'), name) <= 2e-5, name
    run(torchrun('--standalone', '--nproc_per_node=2', *TINY, both[1], f'--out_dir={tmp_path}/apart'))
    assert largest_difference(log(tmp_path / 'whole'), log(tmp_path / 'apart'), 'balance_loss') > 1e-4


def test_balance_by_bias_on_two_processes_and_after_a_stop(tmp_path):
    options = [*TINY, '--balance=bias', '--router=sigmoid', '--norm_topk_prob=True', '--bias_rate=0.01']
    run([sys.executable, *options, f'--out_dir={tmp_path}/one'])
    stopped = subprocess.Popen(
        [sys.executable, *options, f'--out_dir={tmp_path}/two'], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    wait_for_step(tmp_path / 'two', 7)
    stopped.send_signal(signal.SIGINT)
    stopped.communicate(timeout=60)
    run(torchrun('--standalone', '--nproc_per_node=2', *options, f'--out_dir={tmp_path}/two'))
    assert largest_difference(log(tmp_path / 'one'), log(tmp_path / 'two')) <= 1e-5
    one, two = (load_file(tmp_path / name / 'step-00000060' / 'model.safetensors') for name in ('one', 'two'))
    bias = one['h.0.mlp.router.bias']
    assert bias.abs().max() >= 0.05 and (two['h.0.mlp.router.bias'] - bias).abs().max() <= 0.021


def test_checkpoints_of_which_none_can_be_read_are_not_overwritten(alone, tmp_path):
    shutil.copytree(alone, tmp_path / 'run')
    for path in (tmp_path / 'run').glob('step-*/model.safetensors'):
        path.write_bytes(b'')
    done = subprocess.run(
        [sys.executable, *TINY, f'--out_dir={tmp_path}/run'], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and 'holds checkpoints, but none can be read' in done.stderr
    assert len(list((tmp_path / 'run').glob('step-*'))) == 2


def test_a_last_evaluation_that_was_cut_off_is_made_up_for(alone, tmp_path):
    shutil.copytree(alone, tmp_path / 'run')
    rows = (alone / 'log.jsonl').read_text().splitlines()
    (tmp_path / 'run' / 'log.jsonl').write_text('\n'.join(rows[:-1]) + '\n')
    run([sys.executable, *TINY, f'--out_dir={tmp_path}/run'])
    assert log(tmp_path / 'run') == log(alone)


def test_an_evaluation_leaves_the_folder_as_it_is(alone, tmp_path):
    shutil.copytree(alone, tmp_path / 'run')
    before = {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}
    done = run([sys.executable, *TINY, f'--out_dir={tmp_path}/run', '--eval_only=True', '--max_iters=999'])
    assert 'validation' in done.stdout
    assert before == {path: path.read_bytes() for path in (tmp_path / 'run').rglob('*') if path.is_file()}


def test_processes_that_would_continue_from_different_steps_refuse(alone, tmp_path):
    "As on two machines that share no folder: only the first has the checkpoints."
    (tmp_path / '1').mkdir()
    shutil.copytree(alone, tmp_path / '0')
    program = tmp_path / 'program.py'
    program.write_text(
        'import os, sys\nfrom nanomoe.train import main\n'
        'main([*sys.argv[2:], f"--out_dir={sys.argv[1]}/{os.environ[\'RANK\']}"])'
    )
    done = subprocess.run(
        torchrun('--standalone', '--nproc_per_node=2', str(program), str(tmp_path), *TINY[2:]),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert lines_with('the processes would continue from steps 0 to 60', done.stderr) == 1
    assert not list((tmp_path / '1').iterdir())


def test_a_process_that_alone_meets_bad_input_says_so(tmp_path):
    "Only the second one is given a rule to break."
    program = tmp_path / 'program.py'
    program.write_text(
        'import os, sys\nfrom nanomoe.train import main\n'
        'main(sys.argv[1:] + ["--batch_size=0"] * int(os.environ["RANK"]))'
    )
    done = subprocess.run(
        torchrun('--standalone', '--nproc_per_node=2', str(program), *TINY[2:], f'--out_dir={tmp_path}/run'),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and lines_with('batch_size must be at least 1, got 0', done.stderr) == 1


def test_a_new_checkpoint_outlives_those_of_a_longer_run(tmp_path):
    tensors = {'model': {'w': torch.ones(1)}}
    for step in (50, 60, 3):
        checkpoint.save(tmp_path, step, tensors, {}, keep=1)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ['step-00000003', 'step-00000060']


def test_other_token_ids_do_not_begin_a_run(alone, tmp_path):
    data.prepare('numbers', tmp_path / 'other', tokenizer='chars')
    done = subprocess.run(
        [
            sys.executable,
            *TINY,
            f'--init_from={alone}',
            f'--dataset={tmp_path}/other',
            '--vocab_size=257',
            f'--out_dir={tmp_path}/run',
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and 'was tokenized with a different vocabulary than' in done.stderr


def test_a_finished_run_says_what_it_reached(alone):
    done = run([sys.executable, *TINY, f'--out_dir={alone}'])
    for words in ('on the whole validation text', 'gzip -9', 'parameters'):
        assert words in done.stdout
    assert len(log(alone)) == 60


def test_wandb_offline(tmp_path):
    pytest.importorskip('wandb')
    command = [sys.executable, *TINY, f'--out_dir={tmp_path}', '--max_iters=3', '--tracker=wandb']
    done = subprocess.run(
        command,
        env={**ENVIRONMENT, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob('wandb/offline-run-*/*.wandb'))


def test_weights_of_a_run_begin_another(alone, tmp_path):
    run(
        [
            sys.executable,
            *TINY,
            f'--init_from={alone}',
            f'--out_dir={tmp_path}',
            '--max_iters=1',
            '--warmup_iters=0',
        ]
    )
    assert log(tmp_path)[0]['ce'] < log(alone)[0]['ce'] - 1.5


def test_the_preset_tiny_beats_the_compressors(tmp_path):
    "What README says of it, on the same validation bytes."
    run([sys.executable, '-m', 'nanomoe.train', 'tiny', '--device=cpu', f'--out_dir={tmp_path}'])
    entry = TokenDataset('numbers', 'val').manifest['splits']['val']
    assert (
        log(tmp_path)[-1]['val_bpb'] < 0.9 * min(entry['gzip_bytes'], entry['xz_bytes']) * 8 / entry['bytes']
    )
