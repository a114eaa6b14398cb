"""Rendering of faces with OpenGL, at twice the resolution and averaged down.

Needs no display or graphics card: EGL on Mesa's llvmpipe (Debian: libegl1 libgl1-mesa-dri). Set LP_NUM_THREADS=0 and
OPENBLAS_NUM_THREADS=1 in the environment, else idle threads spin. Skin, brows, beard and shirt are painted once per
person into a texture; a frame then costs mesh, lights and read-back, 16 ms of a core.
"""

from pathlib import Path
from typing import Any

import moderngl  # type: ignore[import-not-found]
import numpy as np
from numpy.typing import NDArray

from training.synthetic.face import Face
from training.synthetic.head import Floats, Head
from training.synthetic.person import BACKGROUND_SIDE

SHADERS = Path(__file__).with_name("shaders")
TEXTURE_SIDE = 1024
# The texture unit that programs read.
TEXTURE_UNIT = 0


class Renderer:
    """A renderer of one face at a time.

    size: height and width of pictures. scale: factor of supersampling.
    """

    def __init__(self, head: Head, size: int = 128, scale: int = 2) -> None:
        self.size = size
        self.face: Face | None = None
        self._gl: Any = moderngl.create_standalone_context(backend="egl")
        self._programs = {
            "paint": self._program("paint"),
            "copy": self._program("copy"),
            **{f"head {group}": self._program("head", f"#define GROUP {group}\n") for group in range(3)},
        }
        self._load_mesh(head)
        self._make_targets(size, scale)

    def _program(self, name: str, define: str = "") -> Any:
        noise = (SHADERS / "noise.glsl").read_text()
        vertex, fragment = ((SHADERS / f"{name}.{kind}.glsl").read_text() for kind in ("vertex", "fragment"))
        version = "#version 330\n"
        return self._gl.program(version + vertex, version + define + noise + fragment)

    def _load_mesh(self, head: Head) -> None:
        gl, programs = self._gl, self._programs
        self._moving = gl.buffer(reserve=len(head.part) * 2 * 3 * 4, dynamic=True)
        still = gl.buffer(np.hstack([head.rest, head.mask, head.part[:, None], head.uv]).astype("f4").tobytes())
        triangles = [gl.buffer(head.triangles[group].tobytes()) for group in head.groups()]
        layout = [(self._moving, "3f 3f", "position", "normal"), (still, "3f 16x 1f 2f", "rest", "part", "uv")]
        self._groups = [
            gl.vertex_array(programs[f"head {group}"], layout, indexes, skip_errors=True)
            for group, indexes in enumerate(triangles)
        ]
        painted = [(still, "3f 4f 1f 2f", "rest", "mask", "part", "uv")]
        self._skin = gl.vertex_array(programs["paint"], painted, triangles[0])
        corners = gl.buffer(np.array([-1, -1, 3, -1, -1, 3], "f4").tobytes())
        self._whole = gl.vertex_array(programs["copy"], [(corners, "2f", "corner")])

    def _make_targets(self, size: int, scale: int) -> None:
        gl, large = self._gl, (size * scale, size * scale)
        self._large = gl.texture(large, 4)
        self._paint = gl.texture((TEXTURE_SIDE, TEXTURE_SIDE), 4)
        self._backdrop = gl.texture((BACKGROUND_SIDE, BACKGROUND_SIDE), 3, alignment=1)
        for texture in (self._large, self._backdrop):
            texture.repeat_x = texture.repeat_y = False
        self._drawing = gl.framebuffer([self._large], gl.depth_renderbuffer(large))
        self._painting = gl.framebuffer([self._paint])
        self._result = gl.framebuffer([gl.renderbuffer((size, size), 4)])

    def set_face(self, face: Face) -> None:
        """Load a face: its colours, light, background and painted skin."""
        gl, person = self._gl, face.person
        self.face = face
        values = {**person.look, "camera": face.camera.T, "eye": face.eye}
        for program in self._programs.values():
            for name in program:
                if name in values:
                    program[name].write(np.asarray(values[name], "f4").tobytes())
        self._backdrop.write(np.ascontiguousarray(person.background).tobytes())
        self._painting.use()
        gl.disable(moderngl.DEPTH_TEST | moderngl.BLEND)
        self._painting.clear(*np.sqrt(person.look["skin"]), 0.35)
        self._skin.render()
        self._paint.build_mipmaps()
        self._paint.filter = (moderngl.LINEAR_MIPMAP_NEAREST, moderngl.LINEAR)

    def draw(self, weights: Floats, turn: Floats, gaze: Floats) -> tuple[NDArray[np.uint8], tuple[float, float]]:
        """Draw one frame: return (size, size, 3) RGB and the lips' centre, (row, column) in pixels.

        weights, turn, gaze: as in `Motion`.
        """
        assert self.face is not None, "set a face first"
        gl = self._gl
        positions, normals = self.face.pose(weights, turn, gaze)
        self._moving.write(np.hstack([positions, normals]).astype("f4").tobytes())
        self._drawing.use()
        self._drawing.clear(depth=1.0)
        gl.disable(moderngl.DEPTH_TEST | moderngl.BLEND)
        self._copy(self._backdrop, spread=0)
        gl.enable(moderngl.DEPTH_TEST | moderngl.CULL_FACE)
        self._paint.use(TEXTURE_UNIT)
        skin, inside, hair = self._groups
        skin.render()
        gl.disable(moderngl.CULL_FACE)
        inside.render()
        gl.enable(moderngl.BLEND)
        hair.render()
        gl.disable(moderngl.DEPTH_TEST | moderngl.BLEND)
        self._result.use()
        self._copy(self._large, spread=0.25 / self.size)
        data = self._result.read(components=3, alignment=1)
        picture = np.frombuffer(data, np.uint8).reshape(self.size, self.size, 3)[::-1]
        return picture, self.face.lips_centre(positions, self.size)

    def _copy(self, source: Any, spread: float) -> None:
        """Fill the target with a texture. spread: distance of the four points that a pixel is the mean of."""
        source.use(TEXTURE_UNIT)
        self._programs["copy"]["spread"].value = spread
        self._whole.render()
