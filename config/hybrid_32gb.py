# A hybrid of 399M parameters for a card of 32 GB: 20 layers of width 1024.
#   at rest      399M x 16 bytes (fp32 weight, gradient, two AdamW moments) = 6.0 GB
#   activations  199 KB a token and layer in bf16: 2 x 2048 tokens x 20 layers = 15.2 GB
#   at the peak  21.7 GB without gradient checkpointing, for a vocabulary of 16,384,
#                of some 29.9 GB that such a card has free
#                (all counted by mambino/train/memory.py, not measured)
#   a step       256 sequences x 2048 tokens = 524,288 tokens
#   the run      15,000 steps x 524,288 tokens = 7.9 billion, 20 a parameter (Hoffmann et al. 2022)
out_dir = 'out-hybrid-32gb'

model = 'hybrid'
size = '400m'
block_size = 2048

vram = '32'             # GB: as many sequences at once as fit
tokens_per_step = 256 * 2048
optimizer = 'adamw'
schedule = 'cosine'
learning_rate = 3e-4
max_iters = 15000
warmup_iters = 200
eval_interval = 500
eval_iters = 200        # sequences
