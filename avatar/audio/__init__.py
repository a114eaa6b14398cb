"""Audio in pieces of any size to blocks of audio features.

    AudioPiece --check, resample--> audio at 16 kHz --window, encoder--> states at 50 Hz --interpolate--> Block

`model.py` is the streaming model and the table of encoders; `whole_file.py` computes the features of whole files, which
the stream approximates. Axes: a audio channels, s samples, m mel bins, t encoder frames, l encoder layers, d width,
f pixel frames.
"""
