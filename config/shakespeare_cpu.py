# Characters of Shakespeare on a laptop's CPU, to the loss nanoGPT's CPU command reaches (1.88) in a fraction of its time.
#   12 sequences x 64 characters = 768 tokens a step; 400 steps see 307,000 characters, a third of the text
# first: python prepare.py input.txt --tokenizer=char --out=data/shakespeare_char
# What made the difference, val loss after 400 steps: AdamW 1.96 (500 steps), Muon 1.89, Muon and QK-norm 1.85. Two layers
# beat four in equal time; sequences of 128 or 256, wider MLPs, 8 heads, other rates and batches were no better.
out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'

model = 'gpt'           # --model=mamba and --model=hybrid work as well
n_layer = 2
n_embd = 128
n_head = 4
qk_norm = True
state_size = 32
block_size = 64

batch_size = 12
tokens_per_step = 768
optimizer = 'muon'
learning_rate = 1e-2
max_iters = 400
eval_interval = 200
log_interval = 50
