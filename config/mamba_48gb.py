# A Mamba-2 of 389M parameters for a card of 48 GB: 36 layers of width 1280.
#   at rest      389M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 5.8 GB
#   activations  169 KB a token and layer in bf16: 1 x 4096 tokens x 36 layers = 23.3 GB
#   at the peak  29.6 GB without gradient checkpointing, for a vocabulary of 16,384,
#                of some 45.3 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       128 sequences x 4096 tokens = 524,288 tokens
#   the run      15,000 steps x 524,288 tokens = 7.9 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-mamba-48gb'

model = 'mamba'
size = '400m'
block_size = 4096

vram = '48'             # GB: as many sequences at once as fit
tokens_per_step = 128 * 4096
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 3e-4
max_iters = 15000
warmup_iters = 200
eval_interval = 500
eval_iters = 100        # sequences
