"""A prompt to the text embedding that the network attends to.

    prompt --clean--> text --tokenizer--> at most 512 tokens --encoder--> embedding, a row a token

`prompt.py` cleans, `model.py` is the encoder. transformers is imported only when an encoder is built. Axes: b batch,
n tokens, d width.
"""
