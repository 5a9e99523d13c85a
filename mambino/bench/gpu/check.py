"""The part `check`: each kind of model on the card against the CPU: loss, every gradient, and the
logits of single steps, by the model and by decode.step (`planned`).

In fp32 (TF32 off) they may differ by 1e-4 of the largest. In 16 bits the CPU's fp32 is the
reference, and 2e-2 of the largest are allowed, or, where rounding alone makes more, twice what the
CPU's own 16 bits differ from its fp32."""
import torch

from mambino import machine
from mambino.bench.gpu import models
from mambino.sample import decode

TOLERANCE = dict(float32=1e-4, bfloat16=2e-2, float16=2e-2)
B, T = 2, 128
PROMPT, STEPS = 5, 4        # tokens of a prompt at once, and then one by one


def run(recorder, device, out_dir):
    machine.compute_exactly()
    references = {}
    for dtype, name in models.quick_first(TOLERANCE):
        label = f'{name}, {dtype}'
        with recorder.item(label, 3) as wanted:
            if wanted:
                check(recorder, label, name, dtype, device, references)


def check(recorder, label, name, dtype, device, references):
    if name not in references:
        references[name] = compute(name, 'float32', 'cpu')
    expected = references[name]
    computed = compute(name, dtype, device)
    errors = differences(computed, expected)
    limits = dict.fromkeys(errors, TOLERANCE[dtype])
    rounding = ''
    if dtype != 'float32' and any(errors[what] > limits[what] for what in errors):
        by_cpu = differences(compute(name, dtype, 'cpu'), expected)
        limits = {what: max(limits[what], 2 * by_cpu[what]) for what in limits}
        rounding = '; the CPU\'s own: ' + ', '.join(f'{what} {by_cpu[what]:.0e}' for what in errors)
    passed = all(errors[what] <= limits[what] for what in errors)
    worst = max(computed['gradients'], key=lambda p: gradient_error(computed, expected, p))
    text = ', '.join(f'{what} {errors[what]:.1e}' for what in errors)
    recorder.add(label, f'{text} of the largest (gradients: {worst}); at most {TOLERANCE[dtype]:.0e}{rounding}',
                 passed=passed, **errors)


def compute(name, dtype, device):
    """The loss, gradients {parameter: tensor} and logits of single steps, on a device."""
    net = models.small_model(name).to(device)
    config = net.config
    idx = models.tokens(B, T + 1, config.vocab_size, device)
    net.train()
    with machine.autocast(device, dtype):
        loss = net(models.read_by(net, idx[:, :-1]), idx[:, 1:])[1]
    (loss * (128 if dtype == 'float16' else 1)).backward()
    gradients = {p: tensor.grad / (128 if dtype == 'float16' else 1) for p,
                 tensor in net.named_parameters()}
    net.eval()
    computed = dict(loss=loss.detach(), gradients=gradients)
    if config.objective == 'next':
        computed['steps'] = logits_of(type(net).step, net, idx, device, dtype)
        computed['planned'] = logits_of(decode.step, net, idx, device, dtype)
    return computed


@torch.no_grad()
def logits_of(step, net, idx, device, dtype):
    """Those after a prompt and after each of some tokens, by net.step or by decode.step, which on a
    card has CUDA graphs. (STEPS + 1, B, V)."""
    logits = []
    with machine.autocast(device, dtype):
        out, state = step(net, idx[:, :PROMPT])
        logits.append(out[:, -1].clone())
        for i in range(PROMPT, PROMPT + STEPS):
            out, state = step(net, idx[:, i:i + 1], state)
            logits.append(out[:, -1].clone())
    return torch.stack(logits)


def gradient_error(a, b, name):
    return models.relative_error(a['gradients'][name], b['gradients'][name])


def differences(a, b):
    """{what: the largest difference, as a share of the largest value of b}."""
    errors = dict(
        loss=models.relative_error(a['loss'], b['loss']),
        gradients=max(gradient_error(a, b, name) for name in b['gradients']))
    if 'steps' in b:
        errors['steps'] = models.relative_error(a['steps'], b['steps'])
        errors['planned'] = models.relative_error(a['planned'], b['steps'])
    return errors
