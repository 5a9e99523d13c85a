"""A GGUF file in a real llama.cpp: its server, in this process (pip install xllamacpp: a wheel that
needs no compiler).

    with LlamaServer('model-f32.gguf', n_ctx=128, exact=True) as server:
        ids = server.tokenize('import os')
        logprobs = server.logprobs(ids, net.config.vocab_size)      # of each token as the next one
        answers = server.complete([ids], 32)                        # its own, with its `timings`

It is asked as any other server, by HTTP on a port of this machine that nobody else is told of.
"""
import http.client
import json

import torch

PACKAGE = 'xllamacpp'


class LlamaServer:
    """llama.cpp with a model. rows: how many sequences it works on at once, each of up to n_ctx
    tokens. exact: keys and values in fp32, which by default are F16, and no flash attention, which
    rounds. ImportError: it is not installed; RuntimeError: it does not open the file."""

    def __init__(self, path, n_ctx, rows=1, threads=0, exact=False):
        import xllamacpp as xl
        params = xl.CommonParams()
        params.model.path = str(path)
        params.n_parallel = rows
        params.n_ctx = rows * n_ctx
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        params.port = 0                 # a free one
        params.verbosity = 0
        params.warmup = False
        params.fit_params = False       # the context is as long as it is told
        if exact:
            params.cache_type_k = params.cache_type_v = xl.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xl.Server(params)
        self.address = self.server.listening_address.partition('://')[2]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends it, and gives its memory back."""
        self.server = None

    def ask(self, path, **body):
        """The answer to a request. ValueError: what the server says against it."""
        connection = http.client.HTTPConnection(self.address)   # the server closes one that waits
        connection.request('POST', path, json.dumps(body), {'Content-Type': 'application/json'})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        if 'error' in answer:
            raise ValueError(f'llama.cpp: {answer["error"]["message"]}')
        return answer

    def tokenize(self, text):
        """The ids of a text, in which names of special tokens are text; with those that begin one."""
        return self.ask('/tokenize', content=text, add_special=True, parse_special=False)['tokens']

    def detokenize(self, ids):
        return self.ask('/detokenize', tokens=ids)['content']

    def next_tokens(self, ids, vocab_size, complete=0, reuse=True):
        """What it knows of each token as the next one: a list of dict(id, logprob, bytes), the
        likeliest first. complete: the id of a token that is a whole character: with half a character
        at its end it tells nothing. reuse: whether it may keep what it read of the same beginning."""
        answer = self.ask('/completion', prompt=ids, n_predict=1, n_probs=vocab_size, cache_prompt=reuse,
                          temperature=0, logit_bias=[[complete, 1e6]])  # after the probabilities are taken
        return answer['completion_probabilities'][0]['top_logprobs']

    def logprobs(self, ids, vocab_size, complete=0, reuse=True):
        """(vocab_size,) log-probabilities of the token after these ids; see next_tokens."""
        logprobs = torch.full((vocab_size,), float('nan'), dtype=torch.float64)
        told = self.next_tokens(ids, vocab_size, complete, reuse)
        logprobs[[token['id'] for token in told]] = torch.tensor([token['logprob'] for token in told]).double()
        return logprobs

    def complete(self, prompts, n):
        """Lists of ids, each continued greedily by n tokens, all at once. → its answers, with the
        `timings` that it took itself."""
        answers = self.ask('/completion', prompt=prompts, n_predict=n, temperature=0, samplers=['top_k'], top_k=1,
                           ignore_eos=True, return_tokens=True, cache_prompt=False)
        return answers if isinstance(answers, list) else [answers]
