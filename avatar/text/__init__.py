"""A prompt to the text embedding that the network attends to.

    prompt --clean--> text --tokenizer--> 512 tokens --encoder--> embedding of the prompt's own tokens

`prompt.py` cleans, `model.py` is the encoder. transformers is imported only when an encoder is built. Axes: b batch,
n tokens, d width.
"""
