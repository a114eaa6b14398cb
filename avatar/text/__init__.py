"""A prompt to the embedding that the network attends to.

    prompt --clean--> words --tokenizer--> 512 rows --encoder--> the rows of the prompt's own tokens

`prompt.py` cleans, `model.py` is the encoder. Only what embeds imports transformers. Axes: b batch, n tokens, d width.
"""
