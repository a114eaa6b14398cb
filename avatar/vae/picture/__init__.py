"""Picture files to pixels of the video's size. A process of its own decodes them, since strangers send them.

bytes --read--> decoder process: check the header, decode, turn upright, fit, colour --> (h, w, 3) uint8
"""
