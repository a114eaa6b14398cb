"""Inputs of blocks beside features: the audio of the other person, and face motion.

    HeardAudio --heard--> window of what has arrived --encoder--> `Block.heard`
    loudness of both voices --voice--> phrases --eyes, head_pose--> values of `avatar.types.FACE_MOTION`, frame by frame

Face motion is blinks, head and gaze that follow both voices. Each part is a state of a few numbers that advances by one
pixel frame. Random numbers come from the session's seed and the frame's number, so a stream that is rebuilt from its
state goes on with the same bytes.

Rates, angles and reactions are those of the people that the embedded network is trained on
(`training.synthetic.motion`), whose curves need a whole clip; these need the past alone.
"""
