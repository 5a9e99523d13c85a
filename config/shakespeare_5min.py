# Characters of Shakespeare on two CPU cores, past the loss of nanoGPT's baby GPT on an A100 (1.4697), within 5 minutes.
#   32 sequences x 128 characters = 4,096 tokens a step; 900 steps: the text 3.7 times
# Val loss of one seed (1337): 1.461 after 4 minutes 21 on two cores of a Zen 4, in fp32, which was as fast there.
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
out_dir = 'out-shakespeare-5min'
dataset = 'shakespeare_char'

model = 'mamba'         # 0.85M parameters
n_layer = 8
n_embd = 128
n_head = 2              # gpt and hybrid alone
qk_norm = True
state_size = 16
block_size = 128

batch_size = 32         # all that a step has
tokens_per_step = 4096
optimizer = 'muon'
learning_rate = 1e-2
max_iters = 900
schedule = 'wsd'
decay_fraction = 0.6
warmup_iters = 20
eval_interval = 900     # the whole val split, at the end
log_interval = 50
