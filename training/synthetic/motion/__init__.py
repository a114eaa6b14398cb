"""Motion of a face: lips from the phones; head, eyes and expressions from seeds and from the dialogue's turns.

    Dialogue --perform--> Performance: what the renderer draws, and the truth about blinks, gaze, nods, brows and smiles

Everything needs only numpy.
"""
