"""A prompt to the embedding that the network attends to.

    prompt --clean--> words --tokenizer--> 512 rows --encoder--> the rows of the prompt's own tokens

`prompt.py` cleans, `umt5.py` is the encoder, `model.py` finds and loads what a checkpoint has. Only what embeds imports
transformers. Axes: b batch, n tokens, d width.
"""
