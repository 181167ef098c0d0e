"""Run the rows of the course's scoreboard, two seeds each in turn, and write assets/scoreboard.json.

    python tools/scoreboard.py [LESSON...]      # all rows, or those of these lessons

The rows of lesson 00 run its notebook's cells, all others the command that the file names. Same text, same
number of tokens, bits per byte on the whole validation text. The speed is that of 40 more steps, measured one
row after the other at the end.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / 'assets' / 'scoreboard.json'
SEEDS = 1, 2
SHORT = '--max_iters=40 --eval_interval=40 --checkpoint_interval=40 --eval_iters=1'
LESSON_00 = {'dense': ('MLP', 0), 'eight experts, K = 1': ('MoE', 0), '+ load-balancing loss': ('MoE', 0.01)}
START = 'python -m nanomoe.train configs/first_mixture.toml'
ROWS = [
    (1, 'two experts of half the width', '--top_k 2 --expert_width 128'),
    (2, 'sorted, one grouped product', ''),
    (2, '4 of 32 experts, a quarter as wide', '--n_experts 32 --top_k 4 --expert_width 64'),
    (3, 'bias instead of a loss', '--balance bias --bias_rate 0.01'),
    (3, 'no balancing', '--balance none'),
    (4, 'expert capacity 1.0', '--capacity_factor 1.0'),
    (6, 'learned positions, not rotary', '--positions learned'),
    (7, 'RMS norm, SwiGLU experts', '--norm rmsnorm --activation swiglu --expert_width 171'),
    (8, 'Muon', '--optimizer muon --learning_rate 1e-2'),
    (9, 'no decay of the learning rate', '--decay_lr=False'),
    (10, '64 experts', '--n_experts 64'),
    (11, 'two processes', ''),
    (11, 'what paid, together', '--optimizer muon --learning_rate 1e-2 --n_experts 64'),
]


def curve(run) -> dict:
    "Training loss and load of a run of lesson 00, means over ten steps."
    losses = torch.tensor(run.losses).unfold(0, 10, 10).mean(-1) / math.log(2)
    loads = torch.tensor(run.loads).unfold(0, 10, 10).mean(-1)  # (steps/10, layers, E)
    return dict(
        steps=[10 * i + 5 for i in range(len(losses))],
        bits_per_byte=[round(x, 3) for x in losses.tolist()],
        loads=[[[round(x, 3) for x in layer] for layer in step] for step in loads.tolist()],
    )


def lesson_00(seed: int) -> tuple[list[dict], dict]:
    "The three rows of lesson 00 and their curves, by its notebook's own cells."
    cells = {
        c['id']: ''.join(c['source'])
        for c in json.loads((ROOT / 'nbs/00_first_mixture.ipynb').read_text())['cells']
    }
    names, rows, curves = {'__name__': 'lesson_00'}, [], {}
    for cell in (
        'lesson-imports',
        'text',
        'dense-blocks',
        'gpt',
        'loop',
        'evaluate',
        'mixture',
        'cost-table',
        'mean',
    ):
        exec(cells[cell], names)
    for name, (mlp, weight) in LESSON_00.items():
        run = names['train'](names[mlp], weight, seed=seed)
        curves[name] = curve(run)
        total, active = names['size'](run.model)
        bits = {d: names['bits_per_byte'](run.model, text, every=1) for d, text in names['val_text'].items()}
        loads = torch.tensor(run.loads[-20:]).mean(0) * names['E'] if mlp == 'MoE' else None
        rows.append(
            dict(
                lesson=0,
                name=name,
                command='nbs/00_first_mixture.ipynb',
                bpb=names['mean'](bits),
                tok_per_s=len(run.losses) * 48 * names['T'] / run.seconds,
                params=total,
                active=active,
                max_load=None if loads is None else loads.max().item(),
                dead=None if loads is None else (loads < 0.05).sum().item(),
                dropped=None if loads is None else 0.0,
            )
        )
    return rows, curves


def one_run(lesson: int, name: str, options: str, seed: int) -> dict:
    "A row by the command line of nanomoe.train."
    two = name == 'two processes'
    command = START.replace('python', 'torchrun --standalone --nproc_per_node=2') if two else START
    options += ' --batch_size 24 --gradient_accumulation_steps 2' if two else ''
    words = f'{command} {options}'.split()
    launcher = [sys.executable, '-m', 'torch.distributed.run'] if two else [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*launcher, *words[1:], f'--seed={seed}', f'--out_dir={folder}/run'],
            cwd=ROOT,
            env=os.environ | {'OMP_NUM_THREADS': '1'},
            check=True,
            capture_output=True,
            text=True,
        )
        log = [json.loads(line) for line in Path(folder, 'run', 'log.jsonl').read_text().splitlines()]
    sizes = (
        [line for line in done.stdout.splitlines() if line.startswith('model ')][0].replace(',', '').split()
    )
    end, health = log[-1], log[-1]['health']
    return dict(
        lesson=lesson,
        name=name,
        command=' '.join(words),
        bpb=end['val_bpb'],
        tok_per_s=statistics.median(line['tok_per_s'] for line in log[1:]),
        params=int(sizes[1]),
        active=int(sizes[3]),
        max_load=max(health['max_load']),
        dead=sum(health['dead']),
        dropped=end['drop_rate'],
    )


def merged(rows: list[dict]) -> dict:
    "One row for all seeds: every seed's bits per byte, the median of the rest."
    first = dict(rows[0], bpb=[row['bpb'] for row in rows])
    numbers = {k for k, v in first.items() if isinstance(v, int | float) and k != 'lesson'}
    return first | {k: statistics.median(row[k] for row in rows) for k in numbers - {'params', 'active'}}


def main():
    wanted = set(map(int, sys.argv[1:])) or {0} | {lesson for lesson, *_ in ROWS}
    runs, curves = {}, {}
    for seed in SEEDS:
        rows, first = lesson_00(seed) if 0 in wanted else ([], {})
        curves = first if first and seed == SEEDS[0] else curves
        rows += [one_run(*row, seed) for row in ROWS if row[0] in wanted]
        for row in rows:
            runs.setdefault((row['lesson'], row['name']), []).append(row)
            print(seed, row, flush=True)
    old = json.loads(FILE.read_text()) if FILE.exists() else dict(rows=[], curves={})
    rows = list(map(merged, runs.values()))
    for row in rows:
        if row['lesson']:
            options = next(o for lesson, name, o in ROWS if (lesson, name) == (row['lesson'], row['name']))
            short = one_run(row['lesson'], row['name'], f'{options} {SHORT}', SEEDS[0])
            row['tok_per_s'] = short['tok_per_s']
    rows += [row for row in old['rows'] if row['lesson'] not in wanted]
    order = [(0, name) for name in LESSON_00] + [row[:2] for row in ROWS]
    rows = sorted(
        (r for r in rows if (r['lesson'], r['name']) in order),
        key=lambda r: order.index((r['lesson'], r['name'])),
    )
    machine = f'{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}'
    about = dict(
        made_by='python tools/scoreboard.py', machine=machine, date=date.today().isoformat(), seeds=SEEDS
    )
    FILE.write_text(json.dumps(about | dict(rows=rows, curves=curves or old['curves']), indent=1) + '\n')


if __name__ == '__main__':
    main()
