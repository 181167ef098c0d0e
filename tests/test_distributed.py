"""Experts spread over processes, and sharded models: the numbers of one process, at any number of them, and
across every change of it.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomoe import checkpoint
from nanomoe.config import BadInput, ModelConfig, TrainConfig
from nanomoe.expert_parallel import ExpertParallel, share_of, sort_arrived
from nanomoe.metrics import read_log
from nanomoe.model import GPT, moe_layers, n_params
from nanomoe.optim import make_optimizer, parameter_names
from nanomoe.parallel import DistContext
from nanomoe.presets import PRESETS
from nanomoe.sizing import Layout, state_bytes

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
STEPS = 60
TINY = [
    'tiny',
    '--device=cpu',
    f'--lr_decay_iters={STEPS}',
    '--gradient_accumulation_steps=4',
    '--batch_size=4',
    '--eval_interval=20',
    '--checkpoint_interval=20',
    '--log_interval=1',
    '--eval_iters=3',  # an odd number: in the last round a process has no batch of its own
]
KINDS = {
    'Muon, capacity, bias': ['--optimizer=muon', '--capacity_factor=1.0', '--balance=bias'],
    'AdamW, shared experts, SwiGLU, global': [
        '--n_shared_experts=1',
        '--bias=True',
        '--activation=swiglu',
        '--balance_over=global',
        '--jitter=0.1',
    ],
}


def train(
    folder: Path, processes: int, *options, program=('-m', 'nanomoe.train')
) -> subprocess.CompletedProcess:
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command = [sys.executable, *(launcher if processes > 1 else []), *map(str, program)]
    return subprocess.run(
        [*command, *TINY, f'--max_iters={STEPS}', f'--out_dir={folder}', *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def largest(one: list[dict], other: list[dict], name: str) -> float:
    "The largest difference of a figure between two logs of the same steps."
    assert [row['step'] for row in one] == [row['step'] for row in other]
    return max(abs(a[name] - b[name]) for a, b in zip(one, other) if name in a)


@pytest.fixture(scope='module', params=KINDS)
def alone(request, tmp_path_factory) -> tuple[list[str], Path]:
    "Options, and the run with them on one process."
    folder = tmp_path_factory.mktemp('alone') / 'run'
    done = train(folder, 1, *KINDS[request.param])
    assert done.returncode == 0, done.stderr
    return KINDS[request.param], folder


@pytest.mark.parametrize(
    'processes, spread, options',
    [
        (2, 2, []),
        (4, 2, []),
        (4, 4, []),
        (2, 1, ['--shard=True', '--recompute=True']),
        (4, 2, ['--shard=True']),
    ],
    ids=['EP 2', 'DDP 2 x EP 2', 'EP 4', 'shard 2', 'shard 4 x EP 2'],
)
def test_the_numbers_are_those_of_one_process(alone, tmp_path, processes, spread, options):
    "Loss, gradient norm, evaluation, load and the weights at the end."
    kind, folder = alone
    done = train(tmp_path / 'run', processes, *kind, f'--expert_parallel={spread}', *options)
    assert done.returncode == 0, done.stderr
    assert (f'experts over {spread} of them' in done.stdout) == (spread > 1)
    assert (', sharded' in done.stdout) == bool(options)
    one, many = (read_log(path / 'log.jsonl') for path in (folder, tmp_path / 'run'))
    found = {name: largest(one, many, name) for name in ('ce', 'grad_norm', 'balance_loss', 'val_ce')}
    print(
        f'\n{processes} processes, experts over {spread}, {options}:',
        {k: f'{v:.1e}' for k, v in found.items()},
    )
    assert max(found.values()) <= 1e-5
    assert [row['val_load_numbers'] for row in one if 'val_ce' in row] == [
        row['val_load_numbers'] for row in many if 'val_ce' in row
    ]
    weights = [checkpoint.load_latest(path).tensors for path in (folder, tmp_path / 'run')]
    for group in ('model', 'optim'):
        assert weights[0][group].keys() == weights[1][group].keys()
        torch.testing.assert_close(weights[0][group], weights[1][group], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    'ways',
    [
        ((2, '--expert_parallel=2'), (1, '--seed=1337'), (4, '--expert_parallel=4')),
        ((2, '--shard=True'), (1, '--shard=True'), (4, '--shard=True --expert_parallel=2')),
    ],
    ids=['experts spread', 'sharded'],
)
def test_the_number_of_processes_may_change(alone, tmp_path, ways):
    "Two processes, then one, then four: checkpoints are those of one model."
    options, folder = alone
    for last, (processes, way) in zip((20, 40, 60), ways):
        done = train(tmp_path, processes, *options, *way.split(), f'--max_iters={last}')
        assert done.returncode == 0, done.stderr
        assert len(list(tmp_path.glob(f'step-{last:08d}/model*'))) == processes
    one, mixed = (read_log(path / 'log.jsonl') for path in (folder, tmp_path))
    assert largest(one, mixed, 'ce') <= 2e-6 and largest(one, mixed, 'grad_norm') <= 1e-5
    texts = [
        subprocess.run(
            [sys.executable, '-m', 'nanomoe.sample', str(path), '--seed=1', '--device=cpu'],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for path in (folder, tmp_path)
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 100


@pytest.mark.parametrize('options', [[], ['--expert_parallel=2']], ids=['sharded', 'experts spread too'])
def test_bfloat16_weights_are_gathered(tmp_path, options):
    "Weights that travel in bfloat16 are those that autocast would have made of them."
    words = ['--dtype=bfloat16', '--max_iters=20']
    for name, processes, more in (('one', 1, []), ('many', 2, ['--shard=True', *options])):
        done = train(tmp_path / name, processes, *words, *more)
        assert done.returncode == 0, done.stderr
    one, many = (read_log(tmp_path / name / 'log.jsonl') for name in ('one', 'many'))
    print({name: f'{largest(one, many, name):.1e}' for name in ('ce', 'grad_norm', 'val_ce')})
    assert largest(one[:1], many[:1], 'ce') <= 1e-6  # later, sums in another order show
    assert largest(one, many, 'ce') <= 2e-3 and largest(one, many, 'val_ce') <= 2e-3


OVERFLOW = """import json, sys, torch
from nanomoe import parallel, train
from nanomoe.sharding import local
real = train.Trainer.train_step
def step(run):
    if run.step == 0:
        run.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)
    if run.step == 2 and run.world.rank == 1:
        p = dict(run.model.named_parameters())[sys.argv[1]]
        def spoil(p):
            if run.step == 2: local(p.grad).fill_(torch.inf)
        p.register_post_accumulate_grad_hook(spoil)
    found = real(run)
    with open(f'{sys.argv[2]}.{run.world.rank}', 'a') as f:
        print(json.dumps([run.step, run.skipped, run.scaler.get_scale()]), file=f)
    return found
train.Trainer.train_step = step
train.main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    'name, options',
    [
        ('h.0.mlp.experts.c_fc', ['--expert_parallel=2']),
        ('h.0.mlp.experts.c_fc', ['--shard=True']),
        ('h.1.attn.c_proj.weight', ['--shard=True']),
        ('h.0.mlp.experts.c_fc', ['--shard=True', '--expert_parallel=2']),
    ],
)
def test_an_overflow_on_one_process_is_one_for_all(tmp_path, name, options):
    "Gradients too large for float16 in the part of one process: all skip, and halve the scale of the loss."
    (tmp_path / 'program.py').write_text(OVERFLOW)
    program = (tmp_path / 'program.py', name, tmp_path / 'notes')
    done = train(tmp_path / 'run', 2, '--max_iters=5', *options, program=program)
    assert done.returncode == 0, done.stderr
    notes = [
        [json.loads(line) for line in (tmp_path / f'notes.{rank}').read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert notes[0] == notes[1]
    assert [skipped for _, skipped, _ in notes[0]] == [0, 0, 1, 1, 1] and notes[0][-1][2] == 2.0**9


FULL = """import os, sys
from nanomoe import checkpoint, train
real = checkpoint.write_tensors
def write(path, tensors):
    if os.environ['RANK'] == '1' and '-20-' in str(path): raise OSError(28, 'No space left on device')
    real(path, tensors)
checkpoint.write_tensors = write
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize('way', ['--expert_parallel=2', '--shard=True'])
def test_a_disk_that_is_full_for_one_process(tmp_path, way):
    """The checkpoint of that step is not there, the first process says whose part is missing, and the run
    goes on.
    """
    (tmp_path / 'program.py').write_text(FULL)
    program, folder = (tmp_path / 'program.py',), tmp_path / 'run'
    done = train(folder, 2, way, '--max_iters=40', program=program)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('could not be written (process 1: [Errno 28] No space left on device)') == 1
    assert [path.name for path in checkpoint.steps(folder)] == ['step-00000040']
    assert not list(folder.glob('.tmp-*'))


@pytest.mark.parametrize('way', ['--expert_parallel=2', '--shard=True'])
def test_a_flipped_bit_in_one_part(tmp_path, way):
    "The newest checkpoint is refused by name, and all processes continue from the one before."
    done = train(tmp_path, 2, way, '--max_iters=40')
    assert done.returncode == 0, done.stderr
    part = tmp_path / 'step-00000040' / 'optim-00002-of-00002.safetensors'
    data = bytearray(part.read_bytes())
    data[-9] ^= 4
    part.write_bytes(data)
    done = train(tmp_path, 2, way)
    assert done.returncode == 0 and f'{part} is not what was written' in done.stderr
    assert 'resumed from step 20' in done.stdout
    assert [row['step'] for row in read_log(tmp_path / 'log.jsonl')] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    'processes, options, sentence',
    [
        (1, ['--expert_parallel=2'], 'expert_parallel must divide the number of processes, 1, got 2'),
        (
            2,
            ['--expert_parallel=2', '--n_experts=5'],
            'n_experts must be a multiple of expert_parallel=2, got 5',
        ),
        (2, ['--expert_parallel=0'], 'expert_parallel must be at least 1, got 0'),
        (
            2,
            [
                '--expert_parallel=2',
                '--router=expert_choice',
                '--capacity_factor=1',
                '--eval_capacity_factor=1',
            ],
            'expert_parallel must be 1 with router=expert_choice',
        ),
    ],
)
def test_what_cannot_be_spread_is_refused(tmp_path, processes, options, sentence):
    done = train(tmp_path / 'run', processes, *options)
    assert sentence in done.stderr and not (tmp_path / 'run').exists()
    assert processes > 1 or done.returncode == 2


def test_shares_are_the_whole():
    "Each process's share of a model and of its optimizer, joined as a checkpoint joins them."
    cfg = ModelConfig(vocab_size=30, n_layer=2, n_head=2, n_embd=8, n_experts=6, bias=True)
    model = GPT(cfg)
    optimizer = make_optimizer(model, TrainConfig())
    model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).losses.total.backward()
    optimizer.step()
    state = checkpoint.optimizer_tensors(optimizer, parameter_names(model, optimizer))
    for tensors in (model.state_dict(), state):
        shares = [share_of(tensors, i, 3) for i in range(3)]
        own = [{n: t for n, t in s.items() if i == 0 or '.experts.' in n} for i, s in enumerate(shares)]
        files = {f'x-{i + 1:05d}-of-00003.safetensors': s for i, s in enumerate(own)}
        torch.testing.assert_close(checkpoint.joined(files)['x'], dict(tensors), rtol=0, atol=0)
    whole = {n: p.shape for n, p in model.named_parameters()}
    spread = ExpertParallel(model, DistContext(1, 6), 3)
    assert len(spread.names) == 4 and spread.index == 1
    for name, p in model.named_parameters():
        assert p.shape == (2, *whole[name][1:]) if name in spread.names else p.shape == whole[name]
    with pytest.raises(BadInput, match='must divide the number of processes, 4, got 3'):
        ExpertParallel(model, DistContext(1, 4), 3)


def test_arrived_rows_are_sorted_by_expert():
    counts = torch.tensor([[2, 0, 1], [1, 3, 0]], dtype=torch.int32)  # two senders, three experts
    order, ends = sort_arrived(counts)
    assert order.tolist() == [0, 1, 3, 4, 5, 6, 2] and ends.tolist() == [3, 6, 7]
    order, ends = sort_arrived(counts * 0)
    assert order.tolist() == [] and ends.tolist() == [0, 0, 0]


def test_the_benchmark_counts_what_moves(tmp_path):
    "Spread experts send rows in place of their gradients; what data parallelism sends is known in advance."
    command = [
        sys.executable,
        '-m',
        'nanomoe.bench',
        'parallel',
        '--preset=tiny',
        '--repeats=1',
        f'--json={tmp_path}/rows',
    ]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    rows = {
        (row['case'], row['processes']): row for row in json.loads((tmp_path / 'rows').read_text())['rows']
    }
    cfg, K = replace(PRESETS['tiny'][0], vocab_size=4096), PRESETS['tiny'][0].top_k
    total = n_params(GPT(cfg))[0]
    assert rows['data parallel', 1]['MB sent'] == 0
    assert rows['data parallel', 4]['MB sent'] == pytest.approx(2 * 4 * total * 3 / 4 / 1e6, abs=0.06)
    experts = sum(p.numel() for name, p in GPT(cfg).named_parameters() if '.experts.' in name)
    tokens = (
        len(moe_layers(cfg)) * cfg.block_size * K * cfg.n_embd * 4 * 4 / 2
    )  # half of the rows leave, four times
    expected = 4 * (total - experts) + tokens
    assert rows['experts spread', 2]['MB sent'] == pytest.approx(expected / 1e6, rel=0.25)
    blocks = sum(p.numel() for name, p in GPT(cfg).named_parameters() if name.startswith('h.'))
    gathered = 4 * (2 * total + blocks) * 3 / 4
    assert rows['sharded', 4]['MB sent'] == pytest.approx(gathered / 1e6, abs=0.06)


@pytest.mark.parametrize('spread', [1, 2, 4])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_dry_run_knows_the_memory_of_one_process(spread, optimizer):
    "The formula's bytes are those of the tensors that a process holds."
    cfg = ModelConfig(
        vocab_size=50, n_layer=3, n_head=2, n_embd=16, n_experts=8, bias=True, n_shared_experts=1
    )
    model = GPT(cfg)
    ExpertParallel(model, DistContext(1, 4), spread)
    steps = make_optimizer(model, TrainConfig(optimizer=optimizer))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    steps.step()
    moments = sum(t.nbytes for state in steps.state.values() for name, t in state.items() if name != 'step')
    weights = sum(p.nbytes for p in model.parameters())
    found = state_bytes(cfg, optimizer, Layout(spread))
    assert found == dict(weights=weights, gradients=weights, moments=moments)


def test_a_dry_run_with_spread_experts(tmp_path):
    done = train(tmp_path / 'run', 2, '--expert_parallel=2', '--dry_run')
    assert done.returncode == 0, done.stderr
    assert 'on each process, with the experts over 2 of them' in done.stdout
    assert 'without evaluations and communication, on 2 processes' in done.stdout
    done = train(tmp_path / 'run', 2, '--shard=True', '--dry_run')
    assert 'on each process, sharded over 2' in done.stdout
    done = train(tmp_path / 'run', 1, '--expert_parallel=2', '--dry_run')
    assert done.returncode == 2
    assert 'expert_parallel must divide the number of processes, 1, got 2' in done.stderr
