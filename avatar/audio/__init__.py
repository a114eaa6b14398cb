"""Sound in pieces of any size to blocks of audio features.

    AudioPiece --check, resample--> sound at 16 kHz --window, encoder--> states at 50 Hz --placement--> Block

`model.py` is the streaming model and the table of encoders; `offline.py` is the whole-file rule that the stream
approaches. Axes: a audio channels, s samples, m mel bins, t encoder frames, l encoder layers, d width, f pixel frames.
"""
