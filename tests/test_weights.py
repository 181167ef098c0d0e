"""Weights in and out: every kind of checkpoint by one door, folders that plain transformers loads, dense
models as experts.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_original import FIXTURES, Original, worst
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, Qwen3MoeConfig

from nanomoe import data, evaluate, huggingface, pretrained, sample, train
from nanomoe.checkpoint import save
from nanomoe.command_line import parse
from nanomoe.config import BadInput, ModelConfig, TrainConfig, to_dict
from nanomoe.presets import PRESETS
from nanomoe.tokenizer import (
    EOT,
    PRETOKENIZER_PATTERN,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    train_bpe,
)
from nanomoe.model import GPT, n_params
from nanomoe.huggingface import (
    GPT2_VOCABULARY,
    architecture,
    from_qwen3,
    hf_bpe,
    hf_config,
    hf_tokenizer,
    qwen3_names,
    to_qwen3,
    vocabulary,
)
from nanomoe.pretrained import export_hf, initial_weights, load_model, tokenizer_of
from nanomoe.upcycle import upcycle

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
TEXT = [
    'The cat sat on the mat, the cat sat.',
    "def f(x):\n    return x['é'] + 12345\n",
    'Ünïcödé 日本語 😀 \t\n\n  x',
    "it's 3.14",
]

ROTARY = dict(positions='rotary', norm='rmsnorm', activation='swiglu', qk_norm=True)
SMALL = ModelConfig(block_size=64, n_layer=3, n_head=4, n_embd=32, vocab_size=310, n_experts=1)
MODELS = {
    'experts': replace(
        SMALL, **ROTARY, n_experts=8, top_k=2, expert_width=16, moe_every=1, n_kv_head=2, norm_topk_prob=True
    ),
    'three of them, in every second layer': replace(
        SMALL, **ROTARY, n_experts=3, top_k=2, moe_every=2, mlp_width=40, norm_topk_prob=False
    ),
    'dense': replace(SMALL, **ROTARY, mlp_width=48),
    'gpt2': replace(SMALL, bias=True, activation='gelu_tanh'),
    'gpt2 without biases': replace(SMALL, mlp_width=40),
}


def drawn(cfg: ModelConfig, seed: int = 0) -> GPT:
    "A model in which every array matters: norms and biases random too."
    torch.manual_seed(seed)
    model = GPT(cfg).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def run_of(model: GPT, tokenizer, folder: Path) -> Path:
    "The folder of a run that ended with this model."
    save(folder, 7, {'model': model.state_dict()}, {'config': to_dict(model.cfg, TrainConfig())})
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope='module')
def tokenizer():
    return make_tokenizer('bpe', TEXT, 300)


@pytest.fixture(scope='module')
def exported(tokenizer, tmp_path_factory) -> dict[str, tuple[GPT, Path]]:
    "Each model, and its folder as the command line exports it."
    folder, made = tmp_path_factory.mktemp('exported'), {}
    for i, (name, cfg) in enumerate(MODELS.items()):
        made[name] = drawn(cfg), folder / f'{i}-hf'
        run = run_of(made[name][0], tokenizer, folder / f'{i}-run')
        if i:
            assert export_hf(run, made[name][1]) < 1e-5
        else:
            done = subprocess.run(
                [sys.executable, '-m', 'nanomoe.pretrained', 'export', '--to', 'hf', run, made[name][1]],
                cwd=ROOT,
                env=OFFLINE,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0 and 'differ by at most' in done.stdout, done.stderr
            assert not done.stderr
    return made


# ---- out: what plain transformers makes of an exported folder

READER = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, out in zip(sys.argv[2::2], sys.argv[3::2]):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = json.loads(sys.argv[1])
    ids = torch.tensor(tokenizer(texts[0])['input_ids'])[None, :40]
    with torch.no_grad(): logits = model(ids).logits
    written = model.generate(ids[:, :3], max_new_tokens=12, do_sample=False, eos_token_id=-1)
    wild = model.generate(ids[:, :3], max_new_tokens=60, do_sample=True, temperature=100.0, top_k=0,
                          eos_token_id=-1, num_return_sequences=4)
    np.savez(out, ids=ids, logits=logits, written=written, wild=wild, kind=type(model).__name__,
             tokens=json.dumps([tokenizer(text)['input_ids'] for text in texts]),
             texts=json.dumps([tokenizer.decode(tokenizer(text)['input_ids']) for text in texts]))
assert not [name for name in sys.modules if name.startswith('nanomoe')]
"""


@pytest.fixture(scope='module')
def read(exported, tmp_path_factory) -> dict:
    "What a fresh process without nanomoe reads in each folder."
    folder = tmp_path_factory.mktemp('read')
    files = {name: folder / f'{i}.npz' for i, name in enumerate(exported)}
    words = [str(word) for name, (_, made) in exported.items() for word in (made, files[name])]
    done = subprocess.run(
        [sys.executable, '-c', READER, json.dumps(TEXT), *words],
        cwd=folder,
        env=OFFLINE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: dict(np.load(path)) for name, path in files.items()}


@pytest.mark.parametrize('name', MODELS)
def test_plain_transformers_computes_the_same(name, exported, read, tokenizer):
    model, there = exported[name][0], read[name]
    with torch.no_grad():
        ours = model(torch.from_numpy(there['ids'])).logits
    print(
        f'{name}: {there["kind"]}, logits up to {ours.abs().max():.2f} differ by '
        f'{worst(ours, there["logits"]):.1e}'
    )
    assert worst(ours, there['logits']) < 1e-5
    assert json.loads(str(there['tokens'])) == [tokenizer.encode_ordinary(text) for text in TEXT]
    assert json.loads(str(there['texts'])) == TEXT


@pytest.mark.parametrize('name', MODELS)
def test_plain_transformers_writes_the_same(name, exported, read, tokenizer):
    model, ids = exported[name][0], torch.from_numpy(read[name]['ids'][:, :3])
    steps = sample.generate(model, ids, 12, temperature=0, n_vocab=tokenizer.n_vocab)
    assert read[name]['written'][0, 3:].tolist() == [step.ids.item() for step in steps]
    assert read[name]['wild'].max() < tokenizer.n_vocab  # ids that only fill up the vocabulary never come


@pytest.mark.parametrize('name', MODELS)
def test_there_and_back_is_bit_for_bit(name, exported, tokenizer):
    model, folder = exported[name]
    again = load_model(folder)
    assert again.cfg == model.cfg and vocabulary(tokenizer_of(folder)) == vocabulary(tokenizer)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_a_wrong_weight_would_show(exported, read):
    model, _ = exported['experts']
    ids = torch.from_numpy(read['experts']['ids'])
    with torch.no_grad():
        nudged = drawn(model.cfg)
        nudged.h[1].mlp.experts.c_proj[0, 0] += 0.05
        assert worst(nudged(ids).logits, read['experts']['logits']) > 1e-5


def test_an_export_that_differs_is_not_published(exported, tmp_path, monkeypatch, tokenizer):
    "transformers has loaded what appears: with q and k swapped nothing does."
    run = run_of(exported['experts'][0], tokenizer, tmp_path / 'run')
    names = qwen3_names

    def swapped(cfg):
        return {
            ours: [
                x.replace('gate_proj', '-').replace('up_proj', 'gate_proj').replace('-', 'up_proj')
                for x in theirs
            ]
            for ours, theirs in names(cfg).items()
        }

    monkeypatch.setattr(huggingface, 'qwen3_names', swapped)
    with pytest.raises(RuntimeError, match='differ'):
        export_hf(run, tmp_path / 'out')
    monkeypatch.undo()
    described = hf_config

    def with_the_librarys_epsilon(*args):  # the smallest mistake that we know of
        config = described(*args)
        config.rms_norm_eps = 1e-6
        return config

    monkeypatch.setattr(pretrained, 'hf_config', with_the_librarys_epsilon)
    usual = run_of(GPT(exported['experts'][0].cfg).eval(), tokenizer, tmp_path / 'new')
    with pytest.raises(RuntimeError, match='differ'):
        export_hf(usual, tmp_path / 'out')
    assert {path.name for path in tmp_path.iterdir()} == {'run', 'new'}


def test_only_an_earlier_export_is_replaced(exported, tmp_path, tokenizer):
    run, out = run_of(exported['dense'][0], tokenizer, tmp_path / 'run'), tmp_path / 'out'
    export_hf(run, out)
    (out / 'stale').touch()
    export_hf(run, out)
    assert not (out / 'stale').exists()
    for folder in (run, tmp_path):
        before = sorted(folder.rglob('*'))
        with pytest.raises(BadInput, match='contains something other than an earlier export'):
            export_hf(run, folder)
        assert sorted(folder.rglob('*')) == before


def test_modern_is_a_qwen3_moe_of_nano_moes_cost():
    cfg, _ = PRESETS['modern']
    assert architecture(cfg) == 'qwen3_moe'
    with torch.device('meta'):
        assert n_params(GPT(cfg)) == (106_763_904, 32_446_080)


NO_EQUAL = {
    'experts of GPT-2': (dict(n_experts=4), 'positions=rotary (here learned), norm=rmsnorm (here layernorm)'),
    'rotary with layer norms': (
        ROTARY | dict(norm='layernorm'),
        'For qwen3, set norm=rmsnorm (here layernorm)',
    ),
    'noisy router': (ROTARY | dict(n_experts=4, router='noisy'), 'router=softmax (here noisy)'),
    'shared expert': (ROTARY | dict(n_experts=4, n_shared_experts=1), 'n_shared_experts=0 (here 1)'),
    'queues': (ROTARY | dict(n_experts=4, eval_capacity_factor=2.0), 'eval_capacity_factor=None (here 2.0)'),
    'bias in the choice': (ROTARY | dict(n_experts=4, balance='bias'), 'balance other than bias'),
    'swiglu in GPT-2': (dict(activation='swiglu'), 'activation=gelu or gelu_tanh (here swiglu)'),
    'shared keys in GPT-2': (dict(n_kv_head=2), 'n_kv_head=4 (here 2)'),
}


@pytest.mark.parametrize('name', NO_EQUAL)
def test_what_has_no_equal_is_named(name):
    options, words = NO_EQUAL[name]
    with pytest.raises(BadInput) as refused:
        architecture(replace(SMALL, **options))
    assert words in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'words, sentence',
    [
        ('', 'pretrained needs a command'),
        ('export {run}', 'usage: export RUN DIR'),
        ('send {run} {new}', 'there is no pretrained send'),
        ('export --to gguf {run} {new}', 'gguf'),
        ('export out/nowhere {new}', 'out/nowhere holds no checkpoint'),
        ('export {run} {run}', 'contains something other than an earlier export'),
        ('export {pickled} {new}', 'is no file of arrays and plain values alone, and is not loaded'),
        ('export {plain} {new}', 'no transformers architecture matches. For qwen3_moe, set'),
        ('export {run} {run}/meta.txt/new', 'cannot be written'),
    ],
)
def test_bad_words_get_a_sentence(words, sentence, exported, tokenizer, tmp_path, capsys):
    run = run_of(exported['dense'][0], tokenizer, tmp_path / 'run')
    plain = run_of(GPT(replace(SMALL, n_experts=2)), tokenizer, tmp_path / 'plain')
    (run / 'meta.txt').touch()
    (tmp_path / 'pickled').write_bytes(pickle.dumps(Path()))
    argv = words.format(run=run, plain=plain, new=tmp_path / 'new', pickled=tmp_path / 'pickled').split()
    with pytest.raises(SystemExit) as stopped:
        pretrained.main(argv)
    said = capsys.readouterr().err.strip()
    assert (
        stopped.value.code == 2 and sentence in said and '\n' not in said and not (tmp_path / 'new').exists()
    )


# ---- tokenizers

PATTERNS = {
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    'cl100k': r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| "
    r"?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    'ours': PRETOKENIZER_PATTERN,
}
RANKS = train_bpe(TEXT * 3 + ['1234 5678 12 123 99999', "\n\n\n    \t\t'LL we'll"], 400)
ENCODINGS = {
    name: tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=RANKS, special_tokens={EOT: len(RANKS)})
    for name, pattern in PATTERNS.items()
}
ENCODINGS |= {'bytes': make_tokenizer('bytes', [], 0), 'chars': make_tokenizer('chars', TEXT, 0)}
ENCODINGS['with a gap'] = tiktoken.Encoding(
    'gap',
    pat_str=PRETOKENIZER_PATTERN,
    mergeable_ranks=RANKS,
    special_tokens={EOT: len(RANKS), '<|fim|>': len(RANKS) + 5},
)


@pytest.fixture(scope='module')
def theirs(tmp_path_factory) -> dict:
    "Each encoding as AutoTokenizer reads it back."
    folder = tmp_path_factory.mktemp('tokenizers')
    for name, encoding in ENCODINGS.items():
        hf_tokenizer(encoding, 10**6).save_pretrained(folder / name)
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in ENCODINGS}


WORDS_AND_ALL = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(
            [
                "it's",
                "WE'LL",
                ' the',
                'cat',
                '  ',
                '\n',
                '\n\n',
                '\r\n',
                '\t',
                '1234567',
                '12',
                ' 9',
                'é',
                'é',
                '日本',
                '😀',
                '👨‍👩‍👧',
                '<',
                '|',
                EOT,
                '\u2028',
                '\x85',
                '\xa0',
                '\u3000',
                '()',
                '...',
                '"',
            ]
        ),
        max_size=14,
    ).map(''.join),
)


@pytest.mark.parametrize('name', ENCODINGS)
def test_every_text_has_the_same_tokens(name, theirs):
    encoding, known = ENCODINGS[name], {word for word in ENCODINGS[name]._mergeable_ranks}

    @settings(max_examples=150, deadline=None)
    @given(WORDS_AND_ALL)
    def same(text):
        if name == 'chars':
            text = ''.join(ch for ch in text if ch.encode() in known)
        ids = theirs[name](text)['input_ids']
        assert ids == encoding.encode(text, allowed_special='all') and theirs[name].decode(ids) == text

    same()
    assert theirs[name].eos_token_id == encoding.eot_token and theirs[name].eos_token == EOT


# ---- in: checkpoints of nanoMoE and of nanoGPT


@pytest.fixture(params=FIXTURES, ids=lambda p: p.stem)
def original(request):
    return Original(request.param)


def ckpt(path: Path, weights: dict, args: dict) -> Path:
    "A file as nanoGPT's training writes it."
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p])
    p.sum().backward()
    optimizer.step()
    torch.save(
        dict(
            model=weights,
            optimizer=optimizer.state_dict(),
            model_args=args,
            iter_num=2000,
            best_val_loss=torch.tensor(3.3),
            config=dict(out_dir='out', learning_rate=6e-4, compile=True),
        ),
        path,
    )
    return path


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_the_originals_checkpoint(original, prefix, tmp_path):
    weights = {prefix + name[2:]: original[name] for name in original.numbers if name.startswith('w/')}
    weights[f'{prefix}transformer.h.0.attn.bias'] = torch.ones(
        1, 1, 4, 4
    ).tril()  # its mask, without flash attention
    model = load_model(ckpt(tmp_path / 'ckpt.pt', weights, original.config)).eval()
    assert worst(model(original.x, original.y).logits, original['eval/logits']) < 1e-5
    assert initial_weights(str(tmp_path / 'ckpt.pt'), model.cfg).cfg == model.cfg


@pytest.mark.parametrize('bias', [False, True])
def test_nanogpts_checkpoint(bias, tmp_path):
    model = drawn(replace(SMALL, bias=bias, dropout=0.1))
    weights = {f'transformer.{name}': tensor for name, tensor in model.state_dict().items()}
    args = dict(n_layer=3, n_head=4, n_embd=32, block_size=64, bias=bias, vocab_size=310, dropout=0.1)
    path = ckpt(tmp_path / 'ckpt.pt', weights | {'lm_head.weight': model.wte.weight}, args)
    again = load_model(path)
    assert again.cfg == model.cfg
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    with pytest.raises(BadInput, match="does not define its token ids"):
        tokenizer_of(path)
    del weights['transformer.h.1.ln_1.weight']
    with pytest.raises(BadInput, match=r'the weights lack h.1.ln_1.weight'):
        load_model(ckpt(path, weights, args))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, 'w'))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    bait, path = tmp_path / 'bait', tmp_path / 'ckpt.pt'
    torch.save(dict(model={}, model_args=Attack(str(bait))), path)
    with pytest.raises(BadInput, match='is no file of arrays and plain values alone, and is not loaded'):
        load_model(path)
    assert not bait.exists()
    torch.load(path, weights_only=False)  # what it would have done
    assert bait.exists()


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'no checkpoint', pickle.dumps({'model': 1})])
def test_files_of_others_get_a_sentence(content, tmp_path):
    (tmp_path / 'ckpt.pt').write_bytes(content)
    with pytest.raises(BadInput, match='is not loaded'):
        load_model(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize(
    'held',
    [
        {},
        [1],
        {'model_args': {}},
        {'model_args': dict(n_layer='three'), 'model': {}},
        {
            'model_args': dict(
                block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=4, dropout=0, bias='x'
            ),
            'model': [],
        },
    ],
)
def test_checkpoints_without_a_model_get_a_sentence(held, tmp_path):
    torch.save(held, tmp_path / 'ckpt.pt')
    with pytest.raises(BadInput) as refused:
        load_model(tmp_path / 'ckpt.pt')
    assert '\n' not in str(refused.value) and 'ckpt.pt' in str(refused.value)


# ---- in: folders that transformers has written

TINY = dict(
    vocab_size=97, n_positions=32, n_embd=48, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
)


def gpt2_folder(folder: Path, **options) -> tuple[GPT2LMHeadModel, Path]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**TINY | options)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder, max_shard_size='50KB')
    return model, folder


@pytest.mark.parametrize(
    'options', [{}, dict(activation_function='gelu'), dict(n_inner=100), dict(n_embd=32, n_layer=3)]
)
def test_a_gpt2_of_any_size(options, tmp_path):
    model, folder = gpt2_folder(tmp_path / 'gpt2', **options)
    ours, x = load_model(folder).eval(), torch.arange(32)[None] * 3
    assert worst(ours(x).logits, model(x).logits) < 1e-5
    short = initial_weights(str(folder), replace(ours.cfg, block_size=16)).eval()
    assert worst(short(x[:, :16]).logits, model(x[:, :16]).logits) < 1e-5
    assert len(list(folder.glob('model*.safetensors'))) > 1  # the weights came in parts


@pytest.mark.parametrize(
    'options, words',
    [
        (
            dict(activation_function='relu'),
            'activation_function must be one of gelu_new, gelu_pytorch_tanh, gelu, got relu',
        ),
        (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx must be False'),
        (dict(reorder_and_upcast_attn=True), 'reorder_and_upcast_attn must be False'),
        (dict(tie_word_embeddings=False), 'tie_word_embeddings must be True'),
        (dict(layer_norm_epsilon=1e-6), 'layer_norm_epsilon must be 1e-05'),
    ],
)
def test_a_gpt2_that_ours_is_not(options, words, tmp_path):
    with pytest.raises(BadInput) as refused:
        load_model(gpt2_folder(tmp_path / 'gpt2', **options)[1])
    assert words in str(refused.value) and 'cannot be loaded' in str(refused.value)


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(rms_norm_eps=1e-6), 'rms_norm_eps must be 1e-05'),
        (dict(tie_word_embeddings=False), 'tie_word_embeddings must be True'),
        (dict(rope_theta=1e6), 'rope_theta must be 10000.0'),
        (dict(head_dim=64), 'head_dim must be 8'),
        (dict(mlp_only_layers=[0]), 'mlp_only_layers must leave every n-th layer from the first, got [0]'),
        (dict(attention_bias=True), 'attention_bias must be False'),
        (dict(hidden_act='gelu'), 'hidden_act must be silu'),
    ],
)
def test_a_qwen3_that_ours_is_not(options, words, tmp_path):
    usual = dict(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        intermediate_size=128,
        tie_word_embeddings=True,
    )
    Qwen3MoeConfig(**usual | options).save_pretrained(tmp_path)
    with pytest.raises(BadInput) as refused:
        load_model(tmp_path)
    assert words in str(refused.value)


def test_folders_that_hold_no_model_of_ours(tmp_path, exported):
    LlamaConfig().save_pretrained(tmp_path / 'llama')
    with pytest.raises(BadInput, match='model_type must be one of gpt2, qwen3, qwen3_moe, got llama'):
        load_model(tmp_path / 'llama')
    GPT2Config(**TINY).save_pretrained(tmp_path / 'empty')
    with pytest.raises(BadInput, match='there is no model.*safetensors in it'):
        load_model(tmp_path / 'empty')
    (tmp_path / 'empty' / 'model.safetensors').write_bytes(b'nothing')
    with pytest.raises(BadInput, match='its weights are damaged'):
        load_model(tmp_path / 'empty')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'config.json').write_text('{"model_type": "mystery"}')
    with pytest.raises(BadInput, match='holds no model that can be read'):
        load_model(tmp_path / 'other')
    with pytest.raises(BadInput, match='they are not GPT-2'):
        tokenizer_of(gpt2_folder(tmp_path / 'gpt2')[1])


def test_a_missing_or_left_over_weight_is_named(exported, tmp_path):
    tensors = to_qwen3(exported['experts'][0])
    cfg = exported['experts'][0].cfg
    for change, words in (
        ({'model.norm.weight': None}, 'lack model.norm.weight'),
        ({'model.extra': torch.ones(1)}, 'hold model.extra'),
    ):
        held = {name: t for name, t in (tensors | change).items() if t is not None}
        with pytest.raises(BadInput, match=words):
            from_qwen3(held, cfg)


def test_samples_from_every_kind(exported, tokenizer, tmp_path, capsys):
    run, folder = run_of(exported['dense'][0], tokenizer, tmp_path / 'run'), exported['dense'][1]
    texts = []
    for where in (run, run / 'step-00000007', folder):
        sample.main([str(where), '--start=The cat', '--max_new_tokens=20'])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith('The cat')


# ---- training goes on from all of them


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    "A dense run on the numbers, four steps long, in GPT-2's shape."
    folder = tmp_path_factory.mktemp('trained') / 'dense'
    list(
        train.train(*parse(['tiny', '--n_experts=1', '--max_iters=4', '--device=cpu', f'--out_dir={folder}']))
    )
    return folder


def validation_loss(*words) -> float:
    "The validation loss that `eval_only` reports."
    rows = list(train.train(*parse(['tiny', '--eval_only=True', '--device=cpu', *words])))
    return rows[-1].val['val_ce']


def test_training_starts_from_every_kind(trained, tmp_path):
    loss = validation_loss('--n_experts=1', f'--init_from={trained}')
    export_hf(trained, tmp_path / 'hf')
    assert validation_loss('--n_experts=1', f'--init_from={tmp_path}/hf') == loss
    assert validation_loss('--n_experts=1', f'--init_from={trained}/step-00000004') == loss


def test_training_starts_from_dense_weights(trained):
    loss = validation_loss('--n_experts=1', f'--init_from={trained}')
    chosen = validation_loss('--norm_topk_prob=True', f'--init_from={trained}')
    sliced = validation_loss(
        '--norm_topk_prob=True', '--n_experts=16', '--top_k=8', '--expert_width=32', f'--init_from={trained}'
    )
    undecided = validation_loss(f'--init_from={trained}')
    print(
        f'dense {loss:.7f}, copies {chosen - loss:+.1e}, slices {sliced - loss:+.1e}, shares of all '
        f'{undecided - loss:+.1e}'
    )
    assert max(abs(chosen - loss), abs(sliced - loss)) < 1e-6 and abs(undecided - loss) < 1e-4


def test_training_refuses_other_token_ids(trained, exported):
    with pytest.raises(BadInput, match='was tokenized with a different vocabulary than'):
        validation_loss('--n_experts=1', f'--init_from={exported["gpt2"][1]}')


# ---- upcycling

WAYS = {
    'copies': dict(n_experts=8),
    'one of them': dict(n_experts=8, top_k=1, router='hash', norm_topk_prob=False),
    'halves': dict(n_experts=8, top_k=4, expert_width=64),
    'quarters': dict(n_experts=16, top_k=8, expert_width=32),
    'eighths': dict(n_experts=64, top_k=8, expert_width=16),
    'sigmoid': dict(n_experts=8, router='sigmoid'),
    'all experts': dict(n_experts=6, top_k=6, expert_width=64),
    'every second layer': dict(n_experts=8, moe_every=2),
}
DENSE = {
    'gelu': SMALL,
    'gelu_tanh with biases': replace(SMALL, bias=True, activation='gelu_tanh'),
    'modern': replace(SMALL, **ROTARY),
}


def losses(dense: GPT, cfg: ModelConfig, n: int = 16) -> tuple[float, float, GPT]:
    "The dense model's loss, that of the upcycled one, and this one."
    x = torch.randint(dense.cfg.vocab_size, (n, 65), generator=torch.Generator().manual_seed(1))
    sparse = upcycle(dense, cfg).eval()
    with torch.no_grad():
        return *(model(x[:, :-1], x[:, 1:]).losses.ce.item() for model in (dense, sparse)), sparse


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', DENSE)
def test_experts_start_where_the_dense_model_stands(kind, way):
    dense = drawn(DENSE[kind])
    cfg = replace(dense.cfg, **dict(norm_topk_prob=True, moe_every=1) | WAYS[way])
    before, after, _ = losses(dense, cfg)
    assert abs(after - before) < 2e-6 * before


@pytest.mark.parametrize('router', ['softmax', 'sigmoid'])
def test_gates_that_do_not_sum_to_one_start_close(router):
    dense = drawn(SMALL)
    for way in ('copies', 'quarters') if router == 'softmax' else ('copies',):
        before, after, _ = losses(
            dense, replace(SMALL, norm_topk_prob=False, moe_every=1, **WAYS[way] | dict(router=router))
        )
        assert abs(after - before) < 1e-3


@pytest.mark.parametrize('way', ['halves', 'quarters', 'eighths', 'all experts'])
def test_slices_come_together(way):
    "The K best of tied logits are whole MLPs, for a hundred thousand tokens."
    dense = drawn(SMALL)
    cfg = replace(SMALL, norm_topk_prob=True, moe_every=1, **WAYS[way])
    router, G = upcycle(dense, cfg).h[0].mlp.router, 128 // cfg.expert_width
    with torch.no_grad():
        ids = router(torch.randn(100_000, 32)).expert_ids
    mlps = ids.sort(-1).values.view(len(ids), -1, G)  # (N, K / G, G)
    assert (mlps[..., 1:] == mlps[..., :-1] + 1).all() and (mlps[..., 0] % G == 0).all()


def test_a_router_of_copies_learns_nothing_at_first():
    """Equal experts: cross-entropy does not care who is chosen.

    The experts' gradients differ, as their tokens do.
    """
    dense, x = drawn(SMALL), torch.randint(310, (4, 65))

    def gradients(**options):
        model = upcycle(dense, replace(SMALL, moe_every=1, norm_topk_prob=True, **options)).double()
        model(x[:, :-1], x[:, 1:]).losses.ce.backward()
        mlp = model.h[1].mlp
        return mlp.router.score.weight.grad.abs().max().item(), mlp.experts.c_fc.grad

    copies, experts = gradients(**WAYS['copies'])
    slices, _ = gradients(**WAYS['quarters'])
    assert copies < 1e-12 < 1e-5 < slices
    assert (experts[0] - experts[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(n_shared_experts=1), 'n_shared_experts must be 0'),
        (dict(expert_width=48), "expert_width must divide the dense model's 128, got 48"),
        (dict(expert_width=256), "expert_width must divide the dense model's 128, got 256"),
        (dict(expert_width=32), 'top_k must be a multiple of 4'),
        (dict(expert_width=32, n_experts=6, top_k=4), 'n_experts must be a multiple of 4'),
        (dict(activation='gelu_tanh'), 'activation must be gelu as in the dense model'),
        (dict(n_head=2), 'n_head must be 4'),
        (dict(norm='rmsnorm'), 'norm must be layernorm'),
        (dict(router='expert_choice', capacity_factor=2.0, eval_capacity_factor=2.0), 'let tokens choose'),
        (dict(expert_width=64, top_k=2, router='sigmoid'), 'slices need router=softmax'),
        (dict(bias=True), 'bias must be False'),
        (dict(n_embd=48), 'n_embd must be 32'),
        (dict(n_layer=4), 'n_layer must be 3'),
        (dict(qk_norm=True), 'the weights lack h.0.attn.k_norm.weight'),
    ],
)
def test_what_cannot_become_experts_is_named(options, words):
    with pytest.raises(BadInput) as refused:
        upcycle(drawn(SMALL), replace(SMALL, **dict(n_experts=8, moe_every=1) | options))
    assert words in str(refused.value) and '\n' not in str(refused.value)


def test_narrow_layers_without_experts_are_refused():
    dense = drawn(replace(SMALL, mlp_width=64))
    with pytest.raises(BadInput, match='mlp_width must be 64 as in the dense model, got 128'):
        upcycle(dense, replace(dense.cfg, n_experts=8, mlp_width=None))


# ---- an evaluation that others trust


@pytest.mark.parametrize(
    'options',
    [dict(eval_capacity_factor=1.0), dict(router='expert_choice', eval_capacity_factor=1.0), dict()],
)
def test_the_items_beside_it_do_not_change_a_score(options, tokenizer):
    torch.manual_seed(0)
    cfg = replace(PRESETS['tiny'][0], vocab_size=tokenizer.n_vocab, block_size=64, **options)
    model = GPT(cfg).eval()
    made = evaluate.items(evaluate.addition, 12)
    pairs = [(item.question, ' ' + c) for item in made for c in item.choices]
    alone = [evaluate.score(model, tokenizer, [pair])[0][0] for pair in pairs]
    together = [score for score, _ in evaluate.score(model, tokenizer, pairs)]
    assert together == pytest.approx(alone, abs=1e-3)


def test_a_model_of_nan_has_no_score(tokenizer):
    model = GPT(replace(PRESETS['tiny'][0], vocab_size=tokenizer.n_vocab)).eval()
    torch.nn.init.constant_(model.wte.weight, float('nan'))
    with pytest.raises(BadInput, match='are not numbers'):
        evaluate.score(model, tokenizer, [('1 +', ' 2')])


def test_lm_eval_finds_the_same(exported, tokenizer, tmp_path):
    "Every log-likelihood and every accuracy of our own items, from the exported folder."
    (model, folder), n = exported['experts'], 12
    evaluate.write_tasks(tmp_path, n)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'lm_eval',
            '--model',
            'hf',
            '--model_args',
            f'pretrained={folder}',
            '--tasks',
            ','.join(f'nanomoe_{name}' for name in evaluate.TASKS),
            '--include_path',
            tmp_path,
            '--device',
            'cpu',
            '--output_path',
            tmp_path / 'out',
            '--log_samples',
        ],
        env=OFFLINE | {'HF_DATASETS_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'hf')},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / 'out').rglob('results_*.json')).read_text())['results']
    for name, task in evaluate.TASKS.items():
        made = evaluate.items(task, n)
        samples = next((tmp_path / 'out').rglob(f'samples_nanomoe_{name}_*.jsonl')).read_text()
        found = [json.loads(line) for line in samples.splitlines()]
        theirs = [float(reply[0]) for row in found for reply in row['filtered_resps']]
        scores = evaluate.score(model, tokenizer, [(i.question, ' ' + c) for i in made for c in i.choices])

        assert len(theirs) == len(scores)
        assert max(abs(a - b) for a, (b, _) in zip(theirs, scores)) < 1e-4
        ours = evaluate.measure(model, tokenizer, made)
        assert results[f'nanomoe_{name}']['acc,none'] == pytest.approx(ours['acc'])
        assert name == 'spelling' or results[f'nanomoe_{name}']['acc_norm,none'] == pytest.approx(
            ours['acc_norm']
        )


def test_gpt2s_vocabulary_is_known_without_fetching_it(gpt2_vocabulary, tmp_path, monkeypatch):
    "Eight processes that begin from GPT-2 compare a digest: none of them asks for the vocabulary."
    (tmp_path / 'text.txt').write_text('Experts read what routers send. ' * 50)
    data.prepare(str(tmp_path / 'text.txt'), tmp_path / 'made', 'gpt2')
    data.prepare(str(tmp_path / 'text.txt'), tmp_path / 'bytes', 'bytes')
    assert vocabulary(load_tokenizer(tmp_path / 'made')) == GPT2_VOCABULARY
    monkeypatch.setattr('tiktoken.get_encoding', None)
    pretrained.check_tokenizer('gpt2', tmp_path / 'made')
    with pytest.raises(BadInput, match='was tokenized with a different vocabulary than gpt2'):
        pretrained.check_tokenizer('gpt2', tmp_path / 'bytes')


def test_code_that_a_folder_brings_is_never_run(tmp_path):
    "Nor asked for: `auto_map` names code, and a yes on standard input would run it."
    (tmp_path / 'config.json').write_text(
        json.dumps({'model_type': 'evil', 'auto_map': {'AutoConfig': 'evil.EvilConfig'}})
    )
    (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\n')
    done = subprocess.run(
        [sys.executable, '-m', 'nanomoe.sample', tmp_path],
        input='y\n' * 9,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert (
        done.returncode == 2
        and 'holds no model that can be read' in done.stderr
        and 'wish to run' not in done.stdout + done.stderr
    )
    assert not (tmp_path / 'ran').exists()


def test_what_an_export_says_to_other_programs(exported):
    """transformers 4 would add token types to GPT-2's positions.

    A colleague reads what the folder's owner wrote.
    """
    for _, folder in exported.values():
        flat = json.loads((folder / 'tokenizer_config.json').read_text())
        assert (
            flat['model_input_names'] == ['input_ids', 'attention_mask']
            and flat['pad_token'] == '<|endoftext|>'
        )
        assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file()}) == 1


def test_widths_that_transformers_cannot_multiply_are_refused():
    options = dict(
        vocab_size=64,
        n_layer=1,
        n_head=2,
        positions='rotary',
        norm='rmsnorm',
        qk_norm=True,
        activation='swiglu',
        n_experts=3,
        norm_topk_prob=True,
    )
    assert architecture(ModelConfig(**options, n_embd=32, expert_width=48)) == 'qwen3_moe'
    for width, C in ((50, 32), (24, 30)):
        with pytest.raises(BadInput, match='n_embd and expert_width in multiples of 4'):
            architecture(ModelConfig(**options, n_embd=C, expert_width=width))


def test_a_killed_export_leaves_nothing_to_the_next(exported, tmp_path):
    _, folder = next(iter(exported.values()))
    run = folder.with_name(folder.name.replace('-hf', '-run'))
    left, running = tmp_path / '.tmp-out-999999999', tmp_path / f'.tmp-out-{os.getppid()}'
    for folder in (left, running):
        (folder / 'nanomoe').mkdir(parents=True)
    (tmp_path / '.out.replaced' / 'nanomoe').mkdir(parents=True)  # killed between the two names
    (tmp_path / '.out.replaced' / 'old').touch()
    export_hf(run, tmp_path / 'out')
    assert {path.name for path in tmp_path.iterdir()} == {'out', running.name} and not (
        tmp_path / 'out' / 'old'
    ).exists()


def test_a_folder_that_transformers_saved_again(exported, tokenizer, tmp_path):
    """With its tokenizer it can be sampled and trained from, in several files and in bfloat16 too.

    Without, a sentence names the file.
    """
    from transformers import AutoModelForCausalLM

    for name in exported:
        model, folder = exported[name]
        made = tmp_path / name.replace(' ', '-')
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        theirs.save_pretrained(made, max_shard_size='40KB')
        if model.cfg.vocab_size < 50257:
            with pytest.raises(
                BadInput, match='lacks tokenizer.json; copy it from where the weights come from'
            ):
                sample.load(made, 'cpu')
        AutoTokenizer.from_pretrained(folder).save_pretrained(made)
        again, own = sample.load(made, 'cpu')
        assert vocabulary(own) == vocabulary(tokenizer) and [own.encode_ordinary(t) for t in TEXT] == [
            tokenizer.encode_ordinary(t) for t in TEXT
        ]
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[key]), key
        if len(list(made.glob('model-*.safetensors'))) < 2:
            assert sum(p.numel() for p in model.parameters()) < 20_000, name
        theirs.bfloat16().save_pretrained(tmp_path / 'half')
        assert load_model(tmp_path / 'half').wte.weight.float().sub(model.wte.weight).abs().max() < 0.02
        shutil.rmtree(tmp_path / 'half')


def saved_again(options: dict, tokenizer, folder: Path) -> Path:
    "The folder that `transformers` makes of the export of a small model."
    from transformers import AutoModelForCausalLM

    run = run_of(
        GPT(ModelConfig(block_size=16, n_layer=1, n_head=2, n_embd=8, **dict(n_experts=1) | options)),
        tokenizer,
        folder / 'run',
    )
    export_hf(run, folder / 'once')
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        loader.from_pretrained(folder / 'once').save_pretrained(folder / 'again')
    return folder / 'again'


def test_the_vocabulary_of_what_was_saved_again_is_never_guessed(tokenizer, gpt2_vocabulary, tmp_path):
    """A model as wide as GPT-2's vocabulary keeps its own, characters stay characters, and GPT-2's own file
    is known.
    """
    wide = saved_again(dict(vocab_size=50304), tokenizer, tmp_path / 'wide')
    assert vocabulary(tokenizer_of(wide)) == vocabulary(tokenizer)
    (wide / 'tokenizer.json').unlink()
    with pytest.raises(BadInput, match='it lacks tokenizer.json; copy it from where'):
        tokenizer_of(wide)
    chars = tokenizer_of(
        saved_again(dict(vocab_size=64), make_tokenizer('chars', TEXT, 0), tmp_path / 'chars')
    )
    with pytest.raises(BadInput, match="the vocabulary has no 'Q'"):
        sample.prompt(chars, 'Q')
    known = tiktoken.get_encoding('gpt2')
    _, folder = gpt2_folder(tmp_path / 'gpt2')
    assert vocabulary(known) == GPT2_VOCABULARY
    theirs = hf_bpe(known)
    # as OpenAI's model has it on the hub
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.save(str(folder / 'tokenizer.json'))
    assert pretrained.own_tokenizer(folder) is None


CRAFTED = {
    'merges the other way round': lambda f: f['model']['merges'].reverse(),
    'no vocabulary': lambda f: f['model'].pop('vocab'),
    'no steps': lambda f: f.update(pre_tokenizer=None),
    'an id twice': lambda f: f['model']['vocab'].update({'!': 5, '"': 5}),
    'an empty pattern': lambda f: f['pre_tokenizer']['pretokenizers'][0]['pattern'].update(Regex=''),
    'half a pattern': lambda f: f['pre_tokenizer']['pretokenizers'][0]['pattern'].update(Regex='(a*?'),
    'a pattern that loses text': lambda f: f['pre_tokenizer']['pretokenizers'][0]['pattern'].update(
        Regex='cat'
    ),
    'lower case': lambda f: f.update(normalizer={'type': 'Lowercase'}),
    'other merging': lambda f: f['model'].update(ignore_merges=False),
    'an id below 0': lambda f: f['added_tokens'][0].update(id=-1),
}


def test_a_tokenizer_that_exports_do_not_have_is_refused(tokenizer, tmp_path, capfd):
    folder = saved_again(dict(vocab_size=310), tokenizer, tmp_path)
    flat = (folder / 'tokenizer.json').read_text()
    capfd.readouterr()
    for name, change in CRAFTED.items():
        other = json.loads(flat)
        change(other)
        (folder / 'tokenizer.json').write_text(json.dumps(other))
        with pytest.raises(BadInput, match='tokenizer.json (is not as exports have it|holds no tokenizer)'):
            print(name, tokenizer_of(folder))
    assert 'panicked' not in capfd.readouterr().err


def test_the_run_that_everybody_has_has_an_exportable_sister(tmp_path):
    "`onboard` itself is refused in a sentence that names it; both weigh about the same."
    sizes = [
        n_params(GPT(replace(PRESETS[name][0], vocab_size=4096))) for name in ('onboard', 'onboard_modern')
    ]
    assert all(abs(a - b) < 0.02 * a for a, b in zip(*sizes))
    with pytest.raises(BadInput, match='the preset onboard_modern trains one that has'):
        architecture(PRESETS['onboard'][0])
    run = [
        f'--out_dir={tmp_path}/run',
        '--dataset=numbers',
        '--max_iters=2',
        '--warmup_iters=1',
        '--eval_iters=1',
        '--device=cpu',
        '--block_size=32',
    ]
    list(train.train(*parse(['onboard_modern', *run])))
    assert export_hf(tmp_path / 'run', tmp_path / 'hf') < 1e-5


def test_weights_that_do_not_fit_the_originals_settings_are_named(original, tmp_path):
    weights = {f'module.{name[2:]}': original[name] for name in original.numbers if name.startswith('w/')}
    norm, path = 'module.transformer.ln_f.weight', tmp_path / 'ckpt.pt'
    lacks = {name: tensor for name, tensor in weights.items() if name != norm}
    for change, words in (
        (lacks, 'the weights lack ln_f.weight'),
        (weights | {'module.transformer.extra.weight': torch.zeros(32)}, 'the weights hold extra.weight'),
        (weights | {norm: torch.ones(31)}, r'ln_f.weight must have shape \(32,\), got \(31,\)'),
    ):
        with pytest.raises(BadInput, match=words):
            load_model(ckpt(path, change, original.config))
    model = load_model(ckpt(path, weights, original.config))
    for options, words in (
        (dict(block_size=2 * model.cfg.block_size), 'wpe.weight must have shape'),
        (dict(n_head=2 * model.cfg.n_head), 'n_head must be'),
    ):
        with pytest.raises(BadInput, match=words):
            initial_weights(str(path), replace(model.cfg, **options))


def test_a_tokenizer_larger_than_the_vocabulary_is_not_exported(tokenizer, tmp_path):
    model = GPT(ModelConfig(block_size=8, vocab_size=tokenizer.n_vocab - 1, n_layer=1, n_head=1, n_embd=4))
    with pytest.raises(BadInput, match=f'{tokenizer.n_vocab} entries, more than vocab_size='):
        huggingface.check_exportable(model, tokenizer, tmp_path / 'new')
