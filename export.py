"""Hands a trained model to other tools: writes the files they read, then opens them with the tool
itself and compares.

    python export.py --out_dir=out --format=hf                 # → out-hf/, for transformers, vLLM, …
    python export.py --format=gguf --quantize=int8 --to=phone  # → phone/model-q8_0.gguf, for llama.cpp

    out_dir/best.pt ─► model, ─► a writer for each format ─► to.partial/ ─► checks ─► to/
         its adapter merged in   to_hf, to_gguf, to_onnx, …                 logits, greedy text, ids

    hf            config.json, model.safetensors, tokenizer.json …      transformers
    gguf          model-f32.gguf, model-q8_0.gguf, model-q4_0.gguf      llama.cpp, what is built on it
    onnx          model.onnx for whole texts, step.onnx by token        onnxruntime
    torchscript   step.ts, with its code inside                         torch alone, or libtorch in C++
    safetensors   weights.safetensors, our tensor names                 anything that reads tensors
    native        best.pt: quantised, or an adapter merged              sample.py --out_dir=…
    peft          adapter_config.json, adapter_model.safetensors        peft, for train.py's adapters

What a tool cannot compute exactly as this model does is refused, and the nearest thing that works
is named. A check that fails leaves the files in to.partial, and the exit status is 1. (Of a folder
that is there already it is to/partial, which surely lies on the same disk.)
"""
import os
import sys

from mambino.configurator import configure, fail
from mambino.console import end_quietly

out_dir = 'out'         # folder of train.py's checkpoints (the best is taken), or a checkpoint file;
                        # or hf:folder, a model as transformers saved it
format = 'hf'           # hf, gguf, onnx, torchscript, safetensors, native, peft; several: hf,gguf
to = ''                 # the folder to write; '': out_dir's name and the formats, such as out-hf
quantize = ''           # 'int8' or 'int4' weights; '' keeps all 32 bits
base = ''               # for peft: where its users find the base; '': where we would export it
verify = True           # open what was written with the tool it is for, if installed, and compare
force = False           # write into a folder that is not empty, over files of the same names

# read before torch is there: a typo is told at once
end_quietly()
configure(globals())

import torch

from mambino.blocks import fills_holes
from mambino.export import (
    to_gguf,
    to_hf,
    to_native,
    to_onnx,
    to_peft,
    to_safetensors,
    to_torchscript,
)
from mambino.export.card import card, summary
from mambino.export.compare import silent
from mambino.export.folders import (
    check_folder,
    name_of,
    new_folder,
    partial_of,
    put_in_place,
    size_of,
)
from mambino.weights import adapters
from mambino.weights.checkpoint import refuse_quantized, tokenizer_of
from mambino.weights.loading import contents_of, model_of

# A format is a module with write, which fills a folder; verify, which opens it with the tool it is
# for; opening, the lines that open it; and PACKAGES, what pip must install for that.
FORMATS = {
    'hf': to_hf,
    'gguf': to_gguf,
    'onnx': to_onnx,
    'torchscript': to_torchscript,
    'safetensors': to_safetensors,
    'native': to_native,
    'peft': to_peft,
}


def main():
    formats = list(dict.fromkeys(name.strip() for name in format.split(',') if name.strip()))
    check_settings(formats, quantize)
    ckpt = refuse_quantized(contents_of(out_dir), out_dir)
    folder = to or '-'.join([name_of(out_dir), *formats, *filter(None, [quantize])])
    check_folder(folder, out_dir, 'native' in formats, force)
    foreign = [name for name in formats if name not in ('hf', 'native', 'safetensors')]
    if foreign and fills_holes(ckpt['config']):
        fail(f'format={foreign[0]}: the model in {out_dir} fills holes (objective={ckpt["config"]["objective"]}), and '
             'the tools of that format go on from token to token: hf, native or safetensors can hold it')
    if 'peft' in formats and not ckpt.get('adapter'):
        fail(f'format=peft is for adapters, and {out_dir} holds a whole model: --format=hf, or '
             f'train one with: python train.py config/finetune_lora.py --init_from={out_dir}')

    net, tok = model_of(ckpt), tokenizer_of(ckpt)
    if ckpt.get('adapter') and formats != ['peft']:
        try:
            adapters.merge_adapters(net)
        except ValueError as error:
            fail(f'{out_dir}: {error}')
    net.requires_grad_(False)

    partial = partial_of(folder)
    job = dict(net=net, tok=tok, folder=partial, quantize=quantize, ckpt=ckpt)
    job['base'] = base or exported_base(ckpt)
    with new_folder(partial, folder):
        for name in formats:
            write(name, job)
        checks = {name: check(name, job) if verify else None for name in formats}
        write_card(os.path.basename(os.path.abspath(folder)), job, checks)
        ok = all(result is None or result['ok'] for result in checks.values())
        paths = put_in_place(partial, folder) if ok else []
    if not ok:
        print(f'error: what was written does not compute what {out_dir} does; it stays in '
              f'{partial} for a look', file=sys.stderr)
        sys.exit(1)
    for path in paths:
        print(f'{path}  {size_of(path)}')


# --- the steps ------------------------------------------------------------------------------------

def check_settings(formats, quantize):
    """Ends the program in a line if these are none that can be written."""
    for name in formats:
        if name not in FORMATS:
            fail(f'format={name} must be one or several of {", ".join(FORMATS)}')
    if not formats:
        fail(f'format is empty: one or several of {", ".join(FORMATS)}')
    if quantize not in ('', 'int8', 'int4'):
        fail(f'quantize={quantize} must be int8, int4 or empty')
    if {'hf', 'peft'} <= {*formats}:
        fail('format=hf,peft: transformers would add the adapter to weights that have it already; '
             'export them into two folders')


def exported_base(ckpt):
    """Where we would export the base of an adapter; '' if the checkpoint is none."""
    base = ckpt['adapter']['base'] if ckpt.get('adapter') else ''
    if base.startswith('hf:'):
        return base.removeprefix('hf:')
    return name_of(base) + '-hf' if base else ''


def write(name, job):
    """Writes a format's files into the job's folder. ValueError says what cannot be."""
    try:
        with silent():
            FORMATS[name].write(**job)
    except ImportError as error:
        raise ValueError(missing(name, error)) from None
    except ValueError as error:
        raise ValueError(f'format={name}: {error}') from None
    print(f'{name}: written', flush=True)


def check(name, job):
    """What a format's own tool says of the files, a check as compare.py has it; None if it is not
    installed."""
    try:
        with silent(), torch.no_grad():
            result = FORMATS[name].verify(**job)
    except ImportError as error:
        print(f'{name}: not checked: {missing(name, error)}', flush=True)
        return None
    except Exception as error:  # the other tool's own: it cannot open the file
        first_line = str(error).split('\n')[0][:200]
        result = dict(tool=f'its own tool raised {type(error).__name__}', ok=False, note=first_line)
    print(f'{name}: {"" if result["ok"] else "FAILED: "}{summary(result)}', flush=True)
    return result


def missing(name, error):
    """What to install for a format whose import failed."""
    package = error.name or error
    packages = FORMATS[name].PACKAGES or package
    return f'needs a package that is not installed ({package}): pip install {packages}'


def write_card(name, job, checks):
    openings = {format_name: FORMATS[format_name].opening(name, **job) for format_name in checks}
    text = card(name, job['net'], job['ckpt'], openings, checks)
    path = os.path.join(job['folder'], 'README.md')
    with open(path, 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write(text)


main()
