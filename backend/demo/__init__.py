"""The demo checkpoint: data, tokenizer, training, export and evaluation of a small Qwen2-MoE model, each a command.

python -m backend.demo.prepare    text by domain and a tokenizer
python -m backend.demo.train      a dense model, upcycled to experts and trained on
python -m backend.demo.export     a checkpoint folder that transformers and the engine load
python -m backend.demo.evaluate   accuracy, perplexity, routing and ablations of a checkpoint folder
"""
