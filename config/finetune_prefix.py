# Tunes a finished model to other text by a learned beginning: keys and values of 16 tokens that
# never were, or a Mamba's first state.
# first: python prepare.py more.txt --tokenizer=data/first --out=data/second  # the model's own
# then:  python train.py config/finetune_prefix.py --init_from=out --dataset=second \
#            --out_dir=out-prefix
# It reaches less than LoRA: where config/finetune_lora.py says 1.577, 16 tokens came to 1.767 at a
# rate of 1e-1, to 1.854 at 3e-2. One seed.
adapter = 'prefix'
prefix_length = 16
learning_rate = 1e-1
weight_decay = 0.0
max_iters = 300
eval_interval = 100
