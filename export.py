"""Hands a trained model to other tools: writes the files they read, then opens them with the tool itself and compares.

    python export.py --out_dir=out --format=hf                        # → out-hf/, a folder for transformers, vLLM, lm-eval, …
    python export.py --format=gguf --quantize=int8 --to=phone         # → phone/model-q8_0.gguf for llama.cpp

    out_dir/best.pt ─► model, its adapter merged in ─► a writer for each format ─► to.partial/ ─► checks ─► to/
                                                       to_hf, to_gguf, to_onnx, …                 logits, greedy text, token ids

    hf            config.json, model.safetensors, tokenizer.json …        transformers
    gguf          model-f32.gguf, model-q8_0.gguf or model-q4_0.gguf      llama.cpp and what is built on it
    onnx          model.onnx for whole texts, step.onnx token by token    onnxruntime
    torchscript   step.ts, with its code inside                           torch alone, or libtorch in C++
    safetensors   weights.safetensors, our tensor names                   anything that reads tensors
    native        best.pt: quantised, or an adapter merged                sample.py --out_dir=…
    peft          adapter_config.json, adapter_model.safetensors          peft; for what `train.py --adapter=` made

What a tool cannot compute exactly as this model does is refused, and the nearest thing that works is named. A check that fails leaves the
files in to.partial, and the exit status is 1. (Of a folder that is there already it is to/partial, which surely lies on the same disk.)
"""
import copy
import importlib
import json
import os
import shlex
import shutil
import sys

import torch

from mambino.weights import loading
from mambino.export import to_peft
from mambino.weights import adapters
from mambino.weights import checkpoint
from mambino.weights import quantize as quantizer
from mambino.export import to_hf
from mambino.export.compare import agree, difference, greedy, silent, some_ids
from mambino.configurator import configure, fail

out_dir = 'out'         # folder of train.py's checkpoints (its best one is taken), or a checkpoint file
format = 'hf'           # hf, gguf, onnx, torchscript, safetensors, native, peft; several: hf,gguf
to = ''                 # the folder to write; '': out_dir's name and the formats, such as out-hf
quantize = ''           # 'int8' or 'int4' weights; '' keeps all 32 bits
base = ''               # for peft: the name its users have for the base model, a folder or on the hub; '': where we would export it
verify = True           # open what was written with the tool it is for, where that is installed, and compare
force = False           # write into a folder that is not empty, over files of the same names

PACKAGES = dict(hf='transformers', gguf='gguf', onnx='onnx onnxscript onnxruntime', peft='peft', safetensors='safetensors')
LOADS = dict(
    hf='from transformers import AutoModelForCausalLM, AutoTokenizer\n'
       'model, tok = AutoModelForCausalLM.from_pretrained({folder}{trust}), AutoTokenizer.from_pretrained({folder}{trust})',
    gguf='from llama_cpp import Llama\nmodel = Llama({file})',
    onnx='import onnxruntime\nmodel = onnxruntime.InferenceSession({file})     # step.onnx goes token by token',
    torchscript='import torch\nstep = torch.jit.load({file})',
    safetensors='from safetensors.torch import load_file\nweights = load_file({file})',
    native='python sample.py --out_dir={name}',
    peft='from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, {folder})')


# --- the formats that need no file of their own -----------------------------------------------------------------------

class safetensors:
    """The weights under our names, and in the file's metadata what they make: {'kind', 'config', 'tokenizer'} as JSON."""

    def write(net, tok, folder, quantize):
        if quantize:
            raise ValueError('these weights stay in 32 bits; quantised ones go into --format=native or gguf')
        facts = dict(format='pt', kind=ckpt['kind'], config=json.dumps(checkpoint.config_of(net)))
        facts |= dict(tokenizer=tok.text) if tok else {}
        weights = net.state_dict()
        if net.config.tie_embeddings:
            weights.pop('lm_head.weight')
        to_hf.save_safetensors(os.path.join(folder, 'weights.safetensors'), weights, facts)

    def verify(net, tok, folder, quantize):
        import safetensors as library
        from safetensors.torch import load_file
        found, wanted = load_file(os.path.join(folder, 'weights.safetensors')), net.state_dict()
        tied = {'lm_head.weight'} if net.config.tie_embeddings else set()
        same = found.keys() | tied == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
        return dict(tool=f'safetensors {library.__version__}', ok=same,
                    note=f'{len(found)} tensors, equal bit for bit' if same else 'tensors differ')


class native:
    """A checkpoint without what only training needs. Quantised it is a quarter of the size, or less."""

    def write(net, tok, folder, quantize):
        if quantize:
            net = copy.deepcopy(net)
            quantizer.quantize_model(net, quantize)
        contents = {name: ckpt[name] for name in checkpoint.CONTENTS - {'format', 'weights'}} | dict(
            weights=net.state_dict(), optimizers=[], scaler=None, rng=None, config=checkpoint.config_of(net),
            settings=ckpt['settings'] | dict(adapter=''))                       # which is in the weights now
        checkpoint.save_checkpoint(os.path.join(folder, 'best.pt'), contents | dict(quantized=quantize or None))

    def verify(net, tok, folder, quantize):
        again, rounded, ids = loading.model_of(checkpoint.load_checkpoint(folder)), net, some_ids(net, 2, 64)
        if quantize:
            rounded = copy.deepcopy(net)
            quantizer.quantize_model(rounded, quantize)
        off, same = (difference(again(ids)[0], model(ids)[0]) for model in (net, rounded))
        return dict(tool='sample.py', logits=off, limit=None if quantize else 0.0, ok=same == 0.0,
                    greedy=agree(*(greedy(model, ids[0, :3].tolist(), 64) for model in (net, again))),
                    note=f'{quantize} rounds: its own logits differ' if quantize else '')


class peft:
    """A LoRA, or a prefix of a GPT, as the package peft writes it."""

    def write(net, tok, folder, quantize):
        if quantize:
            raise ValueError('an adapter is small as it is; leave out --quantize')
        made_of = ckpt['adapter']['base']
        to_peft.write_peft(ckpt, folder, base or (made_of[3:] if made_of.startswith('hf:') else name_of(made_of) + '-hf'))

    def verify(net, tok, folder, quantize):
        return to_peft.verify_peft(ckpt, net, folder)


def module_of(name):
    """What writes a format: two functions, write and verify."""
    return dict(safetensors=safetensors, native=native, peft=peft).get(name) or importlib.import_module(f'mambino.export.to_{name}')


# --- the card ---------------------------------------------------------------------------------------------------------

def card(files, checks):
    """The README.md of the folder: what the model is, how it was made, how good it is, how to open it."""
    settings, facts, name = ckpt['settings'], ckpt['metadata'], os.path.basename(os.path.abspath(to))
    c = ckpt['config']
    data = ', '.join(os.path.basename(os.path.normpath(part)) for part in settings['dataset'].split(','))
    lines = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', '---'] if 'hf' in checks else []
    lines += [f'# {name}', '', f'A {ckpt["kind"]} language model of {net_parameters / 1e6:.1f}M parameters: {c["n_layer"]} layers of width '
              f'{c["n_embd"]}, a vocabulary of {c["vocab_size"]}, trained on windows of {c["block_size"]} tokens with Mambino.', '']
    if ckpt.get('adapter'):
        lines += [f'It is a {ckpt["adapter"]["type"]} adapter on `{os.path.basename(name_of(ckpt["adapter"]["base"]))}`'
                  + ('' if 'peft' in checks else ', merged into its weights') + '.', '']
    lines += ['## How to open it', '']
    for kind in checks:
        file = next((f for f in files if f.endswith(dict(gguf='.gguf', onnx='model.onnx', torchscript='.ts', safetensors='.safetensors')
                                                    .get(kind, '\0'))), '')
        trust = ', trust_remote_code=True' if 'modeling_mambino.py' in files else ''
        how = LOADS[kind].format(folder=repr(name), file=repr(file), name=shlex.quote(name), trust=trust)
        if kind == 'hf' and not ckpt['tokenizer']:
            how = 'from transformers import AutoModelForCausalLM\n' + f'model = AutoModelForCausalLM.from_pretrained({name!r}{trust})'
        lines += [f'{kind}:', '', '```' + ('sh' if kind == 'native' else 'python'), how, '```', '']
    lines += ['## Training', '', '| what | value |', '| --- | --- |', f'| data | {data} |', f'| steps | {facts["step"]:,} |',
              f'| tokens | {facts["tokens_seen"]:,} |', f'| time | {facts["seconds"] / 60:,.1f} minutes on {facts["device"]} |']
    lines += [f'| {key} | {settings[key]} |' for key in 'optimizer learning_rate schedule tokens_per_step block_size dropout dtype seed'.split()]
    lines += [f'| {key} | {value} |' for key, value in sorted(c.items()) if key not in ('block_size', 'dropout')]
    lines += ['', '## Evaluation', '', 'On the val split, by steps:', '', '| step | val loss | perplexity | bits per byte |', '| --- | --- | --- | --- |']
    number = lambda value: 'n/a' if value is None else f'{value:.4f}'
    lines += [f'| {at["step"]} | {number(at["val_loss"])} | {number(at.get("perplexity"))} | {number(at.get("bits_per_byte"))} |'
              for at in facts['recent']]
    lines += ['', '## Checks', '', *(f'- {kind}: {say(check)}' for kind, check in checks.items()), '']
    return '\n'.join(lines)


def say(check):
    """A check in a line."""
    if check is None:
        return 'not checked'
    parts = [check['tool']]
    if check.get('logits') is not None:
        parts.append(f'logits within {check["logits"]:.1e}' + (f' (limit {check["limit"]:.0e})' if check.get('limit') else ''))
    parts += [f'greedy tokens {check["greedy"]}'] if check.get('greedy') else []
    parts += [f'texts with equal ids {check["ids"]}'] if check.get('ids') else []
    return ', '.join(parts) + (f'; {check["note"]}' if check.get('note') else '')


# --- the story --------------------------------------------------------------------------------------------------------

def name_of(path):
    """out_dir as a name for what is made of it, to which more can be added: without the file in it."""
    path = os.path.normpath(os.path.dirname(path) if os.path.isfile(path) else path)
    return os.path.abspath(path) if os.path.basename(path) in ('', '.', '..') else path


def missing(kind, error):
    return f'needs a package that is not installed ({error.name or error}): pip install {PACKAGES.get(kind, error.name)}'


def size_of(path):
    size = os.path.getsize(path)
    return f'{size / 1e6:,.1f} MB' if size >= 1e5 else f'{size / 1e3:,.1f} kB'


def look_at_settings():
    for kind in wanted:
        if kind not in LOADS:
            fail(f'format={kind} must be one or several of {", ".join(LOADS)}')
    if not wanted:
        fail(f'format is empty: one or several of {", ".join(LOADS)}')
    if quantize not in ('', 'int8', 'int4'):
        fail(f'quantize={quantize} must be int8, int4 or empty')
    if {'hf', 'peft'} <= {*wanted}:
        fail('format=hf,peft: transformers would add the adapter to weights that have it already; export them into two folders')


def look_at_folder():
    """Nobody else's files may be lost."""
    source = os.path.dirname(out_dir) if os.path.isfile(out_dir) else out_dir
    if os.path.lexists(to) and not os.path.isdir(to):
        fail(f'{to}: is a file; name a folder with --to')
    if 'native' in wanted and os.path.realpath(to) == os.path.realpath(source):
        fail(f'{to}: is where the model itself lies, whose best.pt would be lost; name another folder with --to')
    try:
        if os.path.isdir(to) and os.listdir(to) and not force:
            fail(f'{to}: is not empty; name another folder with --to, or write over the files there with --force')
    except OSError as error:
        fail(f'{to}: cannot be read: {error.strerror}')
    if os.path.lexists(partial):
        fail(f'{partial}: is in the way. If an export left it that failed or was killed, remove it; else name another folder with --to')


def main():
    global to, partial, wanted, ckpt, net_parameters
    wanted = list(dict.fromkeys(f.strip() for f in format.split(',') if f.strip()))
    look_at_settings()
    ckpt = checkpoint.refuse_quantized(checkpoint.load_checkpoint(out_dir), out_dir)
    to = to or '-'.join([name_of(out_dir), *wanted, *([quantize] if quantize else [])])
    partial = os.path.join(to, 'partial') if os.path.isdir(to) else to.rstrip(os.sep + '/') + '.partial'
    look_at_folder()
    if 'peft' in wanted and not ckpt.get('adapter'):
        fail(f'format=peft is for adapters, and {out_dir} holds a whole model: --format=hf, or train one with: '
             f'python train.py config/finetune_lora.py --init_from={out_dir}')

    net, tok = loading.model_of(ckpt), checkpoint.tokenizer_of(ckpt)
    if ckpt.get('adapter') and wanted != ['peft']:
        try:
            adapters.merge_adapters(net)
        except ValueError as error:
            fail(f'{out_dir}: {error}')
    net_parameters = net.num_params()
    net.requires_grad_(False)
    try:
        os.makedirs(partial)
    except OSError as error:
        fail(f'{to}: cannot be written: {error.strerror}')
    try:
        checks = write_and_check(net, tok)
        if all(check is None or check['ok'] for check in checks.values()):
            files = put_in_place()
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, ValueError):
            fail(error)
        if isinstance(error, (OSError, RuntimeError)):                          # torch says RuntimeError of a full disk
            why = getattr(error, 'strerror', None) or 'is the disk full? ' + ''.join(str(error).splitlines()[:1])
            fail(f'{to}: cannot be written: {why}')
        raise
    if os.path.exists(partial):
        print(f'error: what was written does not compute what {out_dir} does; it stays in {partial} for a look', file=sys.stderr)
        sys.exit(1)
    for path in files:
        print(f'{path}  {size_of(path)}')


def write_and_check(net, tok):
    """Fills `partial` → {format: what its check found, or None}."""
    checks = dict.fromkeys(wanted)
    for kind in wanted:
        try:
            with silent():
                module_of(kind).write(net, tok, partial, quantize)
        except ImportError as error:
            raise ValueError(missing(kind, error)) from None
        except ValueError as error:
            raise ValueError(f'format={kind}: {error}') from None
        print(f'{kind}: written', flush=True)
    for kind in wanted if verify else []:
        try:
            checks[kind] = check(kind, net, tok)
            print(f'{kind}: {"" if checks[kind]["ok"] else "FAILED: "}{say(checks[kind])}', flush=True)
        except ImportError as error:
            print(f'{kind}: not checked: {missing(kind, error)}', flush=True)
    files = sorted(os.listdir(partial))
    with open(os.path.join(partial, 'README.md'), 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write(card(files, checks))
    return checks


def check(kind, net, tok):
    """What a format's own tool says of the files. ImportError if it is not installed."""
    try:
        with silent(), torch.no_grad():
            return module_of(kind).verify(net, tok, partial, quantize)
    except ImportError:
        raise
    except Exception as error:                              # the other tool's own: it cannot open the file
        return dict(tool=f'its own tool raised {type(error).__name__}', ok=False, note=str(error).split('\n')[0][:200])


def put_in_place():
    """Renames `partial`, or the files in it, to what they should be → their paths."""
    files = sorted(os.listdir(partial))
    if os.path.isdir(to):
        for file in files:
            os.replace(os.path.join(partial, file), os.path.join(to, file))
        os.rmdir(partial)
    else:
        os.replace(partial, to)
    return [os.path.join(to, file) for file in files]


if __name__ == '__main__':
    configure(globals())
    try:
        main()
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        sys.exit(130)
