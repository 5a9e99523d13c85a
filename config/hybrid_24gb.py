# A hybrid of 399M parameters for a card of 24 GB: 20 layers of width 1024.
#   at rest      399M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 6.0 GB
#   activations  6 KB a token and layer in bf16: 32 x 1024 tokens x 20 layers = 3.6 GB
#   at the peak  15.3 GB with gradient checkpointing, for a vocabulary of 16,384,
#                of some 22.2 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       512 sequences x 1024 tokens = 524,288 tokens
#   the run      15,000 steps x 524,288 tokens = 7.9 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-hybrid-24gb'

model = 'hybrid'
size = '400m'
block_size = 1024

vram = '24'             # GB: as many sequences at once as fit
tokens_per_step = 512 * 1024
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 3e-4
max_iters = 15000
warmup_iters = 200
eval_interval = 500
eval_iters = 3200       # sequences
