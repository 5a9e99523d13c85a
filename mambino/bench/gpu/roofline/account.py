"""A training step of a full-sized model on a card: what each measure brings, by counted bytes and
FLOPs.

    step_of('gpt', card, {'compile', 'batch'})      # seconds, tokens/s, MFU

The micro-step is counted with one and with two layers; what a layer adds is added for the rest.

Beside an H100 (torch 2.11), from which only the shares of attention and scan were taken,
milliseconds of the card by the model and as measured:

    GPT, eager, 16 x 1,024                                   96     98
    GPT without qk_norm, compiled, 32 x 1,024               128    133 in 42 graphs; 124 with RoPE mended
    Mamba-2 of 12 layers, eager in PyTorch, 8 x 1,024        85    102, before chunks were unbound
    Mamba-2 of 12 layers, compiled, our scan, 16 x 1,024     28     33
    Mamba-2 of 36 layers, eager, our kernels, 8 x 1,024      86    119

So a GPT's figures are good to 5%, and a Mamba-2 takes 15 to 40% longer than the model says: it does
not know that memory is read in pieces. That machine took 35 microseconds to launch a kernel, where
the model has 9: eager its steps were longer than the card's work. Beside the code that Inductor
makes for a card, bytes of a layer: GPT 2.74 GB, Inductor's 2.62; Mamba-2 without Triton 3.68,
Inductor's 4.31 of an older version of it."""
from dataclasses import dataclass
from functools import lru_cache

from mambino.bench.gpu import models
from mambino.bench.gpu.roofline import cards, eager, fusion, graphs, standins
from mambino.bench.gpu.roofline.cards import Op

T = 1024
TOKENS = 131072         # of a step, as the recipes have
BATCH = 8               # sequences at once without the measure `batch`
BATCHES = {12: 8, 24: 16, 80: 32}       # with it, by a card's GB
LOSS_CHUNK = 8192       # tokens, with it
MEASURES = {
    'compile': 'torch.compile',
    'batch': 'larger micro-batches and chunks of the loss',
    'merged': 'products of the same matrix merged',
    'weights': 'bf16 weights kept from micro-step to micro-step',
    'triton': 'Mamba-2\'s scan in Triton',
}
UPDATE = 28             # bytes a parameter that AdamW reads and writes, and clipping its gradient:
CLIP = 12
ACCUMULATE = 12         # … that a gradient takes to be added to the one there is
CAST = 6                # … that rounding a weight takes


@dataclass
class Step:
    """A step's time on a card: `micro`, of a micro-step; `whole`, of the step's tokens."""
    micro: float
    whole: float
    bytes: float            # of a micro-step
    launches: int
    tokens_per_second: float
    mfu: float


@lru_cache(None)
def ops_of(kind, n_layer, B, measures):
    """[Op] of a micro-step, without what adds gradients and updates weights."""
    config = models.LARGE_MODELS[kind][1] | dict(n_layer=n_layer)
    functions = (standins.mamba2_scan,) if 'triton' in measures and kind == 'mamba' else ()
    chunk = LOSS_CHUNK if 'batch' in measures else 1024
    if 'compile' not in measures:
        ops = eager.count(kind, config, B, T, chunk, functions)
    else:
        ops = []
        captured = capture(kind, n_layer, B, chunk, functions)
        for graph, phase in zip(captured, ('forward', 'backward')):
            ops += fusion.Fused(graph, phase, merged='merged' in measures).ops
    return [op for op in ops if 'weights' not in measures or op.name != eager.CAST]


@lru_cache(None)
def capture(kind, n_layer, B, chunk, functions):
    config = models.LARGE_MODELS[kind][1] | dict(n_layer=n_layer)
    return graphs.capture(kind, config, B, T, chunk, functions)


def step_of(kind, card, measures):
    """The Step of GPT 270M or Mamba-2 150M ('gpt', 'mamba') with these of MEASURES."""
    config = models.LARGE_MODELS[kind][1]
    net = models.on_device(kind, config, 'meta')
    parameters, layers = net.num_params(), config['n_layer']
    measures = frozenset(measures)
    B = BATCHES[card.memory] if 'batch' in measures else BATCH
    compiled = 'compile' in measures
    one, two = (ops_of(kind, n, B, measures) for n in (1, 2))

    def whole_model(measure):
        """Of all layers, by what one and two have."""
        first, second = sum(map(measure, one)), sum(map(measure, two))
        return first + (layers - 1) * (second - first)
    micro_steps = TOKENS // (B * T)
    launches = whole_model(lambda op: 1)
    host = launches * (cards.LAUNCH_COMPILED if compiled else cards.LAUNCH_EAGER)
    micro = max(whole_model(lambda op: cards.seconds_of(op, card)), host)
    gradients = ACCUMULATE * parameters * compiled          # eager they are counted already
    each = cards.seconds_of(Op('update', 'gradients', gradients), card)
    once = (UPDATE + CLIP + CAST * ('weights' in measures)) * parameters
    whole = micro_steps * micro + (micro_steps - 1) * each + cards.seconds_of(Op('update', 'weights', once), card)
    flops = net.flops_per_token(T) * TOKENS
    return Step(micro, whole, whole_model(lambda op: op.bytes), round(launches), TOKENS / whole,
                flops / whole / card.half)
