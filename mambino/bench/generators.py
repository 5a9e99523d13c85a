"""The contenders of the section generate: ours, transformers and llama.cpp continue a prompt.

contenders.py imports this file from where it stands, whatever checkout the project is from. Each
contender is a function run(model, ids, n, clock): reads ids (B, T), then makes n tokens more than
the first, greedily, and returns the seconds that the prompt took and those of the n. clock: a
function without arguments, time.perf_counter or time.process_time.
"""
import os
import time
from functools import partial

import torch
from contenders import checkout_has, hf_config, our_class, step_of, weights_read

BATCH = 2048    # tokens that llama.cpp reads at once, by default
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


@torch.no_grad()
def generate_ours(model, ids, n, clock, state_dtype):
    step = step_of(model)
    start = clock()
    logits, state = step(ids)
    if state_dtype != 'float32':
        state = checkout_has('mambino.cache:kept_as')(state, getattr(torch, state_dtype))
    token = logits[:, -1].argmax(-1)
    first = clock()
    for _ in range(n):
        logits, state = step(token[:, None], state)
        token = logits[:, -1].argmax(-1)
    return first - start, clock() - first


@torch.no_grad()
def generate_transformers(model, ids, n, clock):
    from transformers import LogitsProcessorList
    times = []

    def note(_, scores):  # called for every token; a streamer takes one sequence only
        times.append(clock())
        return scores

    start = clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=n + 1, max_new_tokens=n + 1,
                   do_sample=False, pad_token_id=0, logits_processor=LogitsProcessorList([note]))
    return times[0] - start, times[-1] - times[0]


def generate_llama(server, ids, n, clock):
    """Its own timings count, which leave the request and its answer out. It takes none of the
    processor's time, and those of sequences that do not fit into one batch overlap: then it is the
    time of a request for one token, and that of n more after a prompt of one token, whose reading
    is one step like theirs."""
    prompts = ids.tolist()
    if clock is time.perf_counter and ids.numel() <= BATCH:
        timings = [answer['timings'] for answer in server.complete(prompts, n + 1)]
        prompt = max(each['prompt_ms'] for each in timings)
        return prompt / 1e3, max(each['predicted_ms'] for each in timings) / 1e3
    start = clock()
    server.complete(prompts, 1)
    first = clock()
    if not n:
        return first - start, 0.0
    server.complete([prompt[-1:] for prompt in prompts], n + 1)
    return first - start, (clock() - first) * n / (n + 1)


def open_transformers(model_class, config, dtype):
    """transformers' model of the same shape; of hybrids the one that transformers has."""
    import transformers
    transformers.logging.set_verbosity_error()
    theirs = hf_config(model_class, config, tie_word_embeddings=True)
    return transformers.AutoModelForCausalLM.from_config(theirs).to(getattr(torch, dtype)).eval()


def open_llama(model, way, rows, length, folder):
    """(a model of ours in llama.cpp's server, as it is by default; the bytes of its file)."""
    from mambino.export import to_gguf
    from mambino.export.gguf_tokenizer import stand_in
    from mambino.export.llama_server import LlamaServer
    path = os.path.join(folder, to_gguf.FILES['' if way == 'float32' else way])
    if not os.path.exists(path):
        to_gguf.write(model, None, folder, '' if way == 'float32' else way, vocabulary=stand_in)
    return LlamaServer(path, n_ctx=length, rows=rows), os.path.getsize(path)


def prepared(model, way):
    """A model of ours as sample.py prepares it, in this checkout's way."""
    if way != 'float32':
        return checkout_has('mambino.weights.quantize:quantize_model', 'quantize:quantize')(model, way)
    try:
        return checkout_has('mambino.weights.dense:read_few_rows')(model)
    except ImportError:  # before, fp32 was as the model has it
        return model


def generate(job, settings):
    """Facts, warm-up and turn of a contender; the model is job's `kind` and `fields`, its prompts
    are `prompts`. The first is continued; the others are read alone."""
    torch.manual_seed(0)
    way = job['dtype']
    prompts = job['prompts']
    model_class, config_class = our_class(job['kind'])
    config = config_class(**job['fields'])
    if job['by'] == 'transformers':
        model = open_transformers(model_class, config, way)
        run, size = generate_transformers, weights_read(model)
    elif job['by'] == 'llama.cpp':
        net = model_class(config).eval()
        model, size = open_llama(net, way, job['batch'], config.block_size, job['folder'])
        run = generate_llama
    else:
        model = prepared(model_class(config).eval(), way)
        run, size = partial(generate_ours, state_dtype=job.get('state_dtype', 'float32')), weights_read(model)
    run = partial(run, model, clock=CLOCKS[settings.clock])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (job['batch'], max(prompts)), generator=generator)

    def turn():
        """Each prompt so often that it has its share of `seconds`."""
        times = {'token': []}
        for T in prompts:
            n = settings.new_tokens if T == prompts[0] else 0
            reading = times[f'prompt {T}'] = []
            end = time.perf_counter() + settings.seconds / len(prompts)
            while not reading or time.perf_counter() < end:
                prompt, rest = run(ids[:, :T], n)
                reading.append(prompt)
                if n:
                    times['token'].append(rest / n)
        return times

    def warm_up():
        for T in prompts:
            run(ids[:, :T], 2)
    return dict(weights=size), warm_up, turn
