"""Drawn people who talk: one seed is one person, drawn with any of 52 expressions, a pose of the head and a gaze.

    Head (the pack) --person_of(seed)--> Person --> Face --Stage.draw(Expression)--> a picture, and where the lips are

Geometry needs numpy alone; only `stage` needs moderngl and an OpenGL driver.
"""
