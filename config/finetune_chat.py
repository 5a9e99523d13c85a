# Tunes a finished model to answer: on conversations, of which the answers alone are learned.
# first: python prepare.py chats.jsonl --tokenizer=data/first --out=data/chats  # the model's own
# then:  python train.py config/finetune_chat.py --init_from=out --dataset=chats --out_dir=out-chat
# talk:  python sample.py --out_dir=out-chat --interactive=True --chat=True
# A mixture keeps what the model knew: --dataset=chats:0.8,first:0.2 reads a fifth of its old text.
learning_rate = 3e-4        # a third of a first training's: it is to learn a manner, not a language
warmup_iters = 20
weight_decay = 0.0          # its weights are good where they are
tokens_per_step = 16384     # about 5,000 of them learned, where prompts are twice as long as answers
max_iters = 600             # at most; conversations are few, and soon known by heart:
eval_interval = 50          # best.pt is of the best evaluation,
patience = 4                # and after four that were no better the run ends
