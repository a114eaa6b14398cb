"""Faces in pictures: a detector, and the crop of a picture around a face.

RGB image --find_faces--> faces, largest first --frame_face--> crop, notice
"""
