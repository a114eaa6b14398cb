"""Synthetic talking people: one seed is one person, drawn with any of 52 expressions, a head pose and a gaze.

    Head (the pack) --person_of(seed)--> Person --> Face --Renderer.draw(expression)--> picture and position of the lips

Geometry needs only numpy; `renderer` needs moderngl and an OpenGL driver.
"""
