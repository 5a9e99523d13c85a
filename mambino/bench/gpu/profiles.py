"""The part `memory`: the recipes for cards of 8 to 48 GB, planned as train.py plans them, and some
steps with no more memory than such a card has free: what the allocator took at most, beside the
estimate."""
import ast
import os
import runpy

import torch

from mambino.bench.gpu import models
from mambino.bench.gpu.running import ROOT
from mambino.train import memory
from mambino.train.sizes import SIZES
from mambino.weights import checkpoint

ORDER = (8, 12, 24, 16, 48, 32)     # GB
KINDS = ('gpt', 'mamba', 'hybrid')
VOCABULARY = 16384
SEEN = 0.965            # of a card's GB the driver shows so much
OTHERS = 1.0            # GiB of it that the context, libraries and a desktop have
TOLERANCE = 0.15        # by which the peak may miss the estimate
STEPS = 3


def run(recorder, device, out_dir):
    for gigabytes in ORDER:
        for kind in KINDS:
            label = f'{kind}, {gigabytes} GB'
            with recorder.item(label, 12) as wanted:
                if wanted:
                    measure(recorder, label, kind, gigabytes, device)


def recipe_of(kind, gigabytes):
    """(settings of the recipe as train.py would have them, the model's config)."""
    settings = settings_of(os.path.join(ROOT, 'train.py')) | dict(dtype='bfloat16')
    recipe = runpy.run_path(os.path.join(ROOT, 'config', f'{kind}_{gigabytes}gb.py'))
    settings |= {name: value for name, value in recipe.items() if not name.startswith('_')}
    fields = checkpoint.MODELS[kind][1].__dataclass_fields__
    config = dict(SIZES[kind, settings['size']], vocab_size=VOCABULARY)
    config |= {name: value for name, value in recipe.items() if name in fields}
    if kind != 'mamba':
        config.setdefault('n_head', max(1, config['n_embd'] // 64))     # as train.py fills it in
    return settings, config


def settings_of(script):
    """{name: value} of a script's settings as it assigns them; the script does not run."""
    with open(script, encoding='utf-8') as f:
        body = ast.parse(f.read()).body
    settings = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                settings.setdefault(node.targets[0].id, ast.literal_eval(node.value))
            except ValueError:          # not a setting: it is computed
                continue
    return settings


def measure(recorder, label, kind, gigabytes, device):
    settings, config = recipe_of(kind, gigabytes)
    settings['device'] = device
    is_cuda = device.startswith('cuda')
    limit = (gigabytes * SEEN - OTHERS) * 2**30
    if is_cuda:
        total = torch.cuda.mem_get_info(device)[1]
        if limit > 0.95 * total:
            recorder.add(label, f'left out: the card has {total / 2**30:.0f} GiB')
            return
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / total, torch.cuda.current_device())
        torch.cuda.reset_peak_memory_stats(device)
    else:
        config |= models.tiny(kind)
        settings |= dict(block_size=64, tokens_per_step=128, size='')
        config['block_size'] = 64
    net = models.on_device(kind, config, device)
    micro_batch, line = memory.choose_micro_batch(settings, net)
    T = settings['block_size']
    checkpointing = settings['gradient_checkpointing']
    estimated = memory.estimate(kind, checkpoint.config_of(net), micro_batch, T,
                                torch.device(device).type,
                                settings['dtype'], settings['optimizer'], checkpointing)['total']
    net.gradient_checkpointing = checkpointing
    training = models.Training(net, device, settings['dtype'], micro_batch, T)
    try:
        for _ in range(STEPS):
            training.micro_step()
            training.micro_step()
            training.update()
        if not is_cuda:
            loss = training.micro_step().item()
            recorder.add(label, f'{micro_batch} x {T}, estimate {estimated / 1e6:.0f} MB, loss {loss:.2f}; {line}')
            return
        peak = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
        recorder.add(
            label, f'{micro_batch} x {T}{" with checkpointing" if checkpointing else ""}: peak {peak / 2**30:.2f} GiB, '
            f'{peak / estimated:.2f} of the estimate {estimated / 2**30:.2f}; reserved {reserved / 2**30:.2f} of '
            f'{limit / 2**30:.2f} that such a card has free',
            passed=abs(peak / estimated - 1) <= TOLERANCE,
            peak=peak, reserved=reserved, estimate=estimated, limit=limit, micro_batch=micro_batch)
    except torch.OutOfMemoryError as error:
        message = str(error).partition('. GPU')[0]
        raise RuntimeError(f'{micro_batch} x {T}, estimate {estimated / 2**30:.2f} GiB of '
                           f'{limit / 2**30:.2f}: {message}') from None
    finally:
        if is_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
