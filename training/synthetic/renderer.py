"""Rendering of faces with OpenGL, at twice the resolution and averaged down.

Needs no display or graphics card: EGL on Mesa's llvmpipe (Debian: libegl1 libgl1-mesa-dri). Set LP_NUM_THREADS=0 and
OPENBLAS_NUM_THREADS=1 in the environment, else idle threads spin. Skin, brows, stubble and shirt are painted once per
person into a texture; a frame then costs meshes, a shadow map, lights and read-back.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moderngl  # type: ignore[import-not-found]
import numpy as np
from numpy.typing import NDArray

from training.synthetic.accessories import LENS
from training.synthetic.face import Face, Pose
from training.synthetic.head import Floats, Head
from training.synthetic.scene import BACKGROUND_SIDE

SHADERS = Path(__file__).with_name("shaders")
TEXTURE_SIDE = 1024
SHADOW_SIDE = 384
# Distance, by a pixel, of the four points that a pixel is the mean of. At .25 pictures are as crisp as they can be,
# which no lens is; at .4 enlarging a picture of half the size gives 36 dB, and not 33.
SOFTNESS = 0.4
# Half the side of the cube that casts shadows, in dm.
SHADOW_REACH = 2.1
# The texture units that programs read.
TEXTURE_UNIT, SHADOW_UNIT = 0, 1


@dataclass(frozen=True, eq=False)
class Picture:
    """A drawn frame.

    pixels: (size, size, 3) RGB. lips: (row, column) of their centre in pixels. gap: height of the opening between the
    inner lips in pixels.
    """

    pixels: NDArray[np.uint8]
    lips: tuple[float, float]
    gap: float


@dataclass(frozen=True, eq=False)
class Layer:
    """Vertices that move, in a buffer, and the vertex arrays that draw them, and their shadows."""

    moving: Any
    drawn: tuple[Any, ...]
    shadow: Any

    def release(self) -> None:
        for part in (*self.drawn, self.shadow, self.moving):
            part.release()


class Renderer:
    """A renderer of one face at a time.

    size: height and width of pictures. scale: factor of supersampling.
    """

    def __init__(self, head: Head, size: int = 256, scale: int = 2) -> None:
        self.size = size
        self.face: Face | None = None
        self._gl: Any = moderngl.create_standalone_context(backend="egl")
        self._programs = {
            **{name: self._program(name) for name in ("paint", "copy", "strand", "solid", "shadow")},
            **{f"head {group}": self._program("head", f"#define GROUP {group}\n") for group in range(3)},
        }
        self._load_mesh(head)
        self._hair: Layer | None = None
        self._worn: Layer | None = None
        self._make_targets(size, scale)

    def _program(self, name: str, define: str = "") -> Any:
        shared = "".join((SHADERS / f"{part}.glsl").read_text() for part in ("noise", "light"))
        vertex, fragment = ((SHADERS / f"{name}.{kind}.glsl").read_text() for kind in ("vertex", "fragment"))
        version = "#version 330\n"
        program = self._gl.program(version + shared + vertex, version + define + shared + fragment)
        if "shadows" in program:
            program["shadows"].value = SHADOW_UNIT
        return program

    def _load_mesh(self, head: Head) -> None:
        gl, programs = self._gl, self._programs
        moving = gl.buffer(reserve=len(head.part) * 2 * 3 * 4, dynamic=True)
        still = gl.buffer(np.hstack([head.rest, head.mask, head.part[:, None], head.uv]).astype("f4").tobytes())
        triangles = [gl.buffer(head.triangles[group].tobytes()) for group in head.groups()]
        layout = [(moving, "3f 3f", "position", "normal"), (still, "3f 16x 1f 2f", "rest", "part", "uv")]
        groups = [
            gl.vertex_array(programs[f"head {group}"], layout, indexes, skip_errors=True)
            for group, indexes in enumerate(triangles)
        ]
        self._head = Layer(moving, tuple(groups), self._shadow(moving, triangles[0]))
        painted = [(still, "3f 4f 1f 2f", "rest", "mask", "part", "uv")]
        self._skin = gl.vertex_array(programs["paint"], painted, triangles[0])
        corners = gl.buffer(np.array([-1, -1, 3, -1, -1, 3], "f4").tobytes())
        self._whole = gl.vertex_array(programs["copy"], [(corners, "2f", "corner")])

    def _shadow(self, moving: Any, triangles: Any) -> Any:
        return self._gl.vertex_array(self._programs["shadow"], [(moving, "3f 12x", "position")], triangles)

    def _make_targets(self, size: int, scale: int) -> None:
        gl, large = self._gl, (size * scale, size * scale)
        self._large = gl.texture(large, 4)
        self._paint = gl.texture((TEXTURE_SIDE, TEXTURE_SIDE), 4)
        self._backdrop = gl.texture((BACKGROUND_SIDE, BACKGROUND_SIDE), 3, alignment=1)
        self._shadows = gl.depth_texture((SHADOW_SIDE, SHADOW_SIDE))
        self._shadows.compare_func = "<="
        for texture in (self._large, self._backdrop, self._shadows):
            texture.repeat_x = texture.repeat_y = False
        self._drawing = gl.framebuffer([self._large], gl.depth_renderbuffer(large))
        self._casting = gl.framebuffer(depth_attachment=self._shadows)
        self._painting = gl.framebuffer([self._paint])
        self._result = gl.framebuffer([gl.renderbuffer((size, size), 4)])

    def set_face(self, face: Face) -> None:
        """Load a face: its colours, light, background, painted skin, hair and accessories."""
        gl, person = self._gl, face.person
        self.face = face
        lamp = lamp_matrix(person.look["lights"][0], face.middle)
        values = {**person.look, "camera": face.camera.T, "eye": face.eye, "middle": face.middle, "lamp": lamp.T}
        for program in self._programs.values():
            for name in program:
                if name in values:
                    program[name].write(np.asarray(values[name], "f4").tobytes())
        self._backdrop.write(np.ascontiguousarray(person.background[::-1]).tobytes())
        self._painting.use()
        gl.disable(moderngl.DEPTH_TEST | moderngl.BLEND)
        self._painting.clear(*np.sqrt(person.look["skin"]), 0.35)
        self._skin.render()
        self._paint.build_mipmaps()
        self._paint.filter = (moderngl.LINEAR_MIPMAP_NEAREST, moderngl.LINEAR)
        self._load_hair(face)
        self._load_worn(face)

    def _load_hair(self, face: Face) -> None:
        if self._hair is not None:
            self._hair.release()
        self._hair = None
        if face.ribbons is not None:
            gl, ribbons = self._gl, face.ribbons
            moving = gl.buffer(reserve=len(ribbons) * 6 * 4, dynamic=True)
            still, triangles = gl.buffer(ribbons.texture.astype("f4").tobytes()), gl.buffer(ribbons.triangles.tobytes())
            layout = [(moving, "3f 3f", "position", "tangent"), (still, "4f", "strand")]
            drawn = gl.vertex_array(self._programs["strand"], layout, triangles, skip_errors=True)
            self._hair = Layer(moving, (drawn,), self._shadow(moving, triangles))

    def _load_worn(self, face: Face) -> None:
        if self._worn is not None:
            self._worn.release()
        self._worn = None
        if face.solid is not None:
            gl, solid = self._gl, face.solid
            moving = gl.buffer(reserve=len(solid.kind) * 6 * 4, dynamic=True)
            still = gl.buffer(np.hstack([solid.position, solid.colour, solid.kind[:, None]]).astype("f4").tobytes())
            is_lens = solid.kind[solid.triangles[:, 0]] == LENS
            layout = [(moving, "3f 3f", "position", "normal"), (still, "3f 4f 1f", "rest", "paint", "kind")]
            opaque, lenses = (solid.triangles[kind] for kind in (~is_lens, is_lens))
            drawn = [
                gl.vertex_array(self._programs["solid"], layout, gl.buffer(part.tobytes()), skip_errors=True)
                for part in (opaque, lenses)
                if len(part)
            ]
            self._worn = Layer(moving, tuple(drawn), self._shadow(moving, gl.buffer(opaque.tobytes())))

    def draw(self, weights: Floats, turn: Floats, gaze: Floats, trail: Floats | None = None) -> Picture:
        """Draw one frame. weights, turn, gaze, trail: as `Motion.frames` yields them."""
        assert self.face is not None, "set a face first"
        gl = self._gl
        pose = self.face.pose(weights, turn, gaze, trail)
        layers = self._upload(pose)
        self._casting.use()
        self._casting.clear(depth=1.0)
        gl.enable(moderngl.DEPTH_TEST)
        gl.disable(moderngl.CULL_FACE | moderngl.BLEND)
        for layer in layers:
            layer.shadow.render()
        self._shadows.use(SHADOW_UNIT)
        self._drawing.use()
        self._drawing.clear(depth=1.0)
        # From front to back, so that little is shaded in vain; what blends comes last.
        if self._hair is not None:
            self._hair.drawn[0].render()
        if self._worn is not None:
            self._worn.drawn[0].render()
        skin, inside, cap = self._head.drawn
        inside.render()
        self._paint.use(TEXTURE_UNIT)
        gl.enable(moderngl.CULL_FACE)
        skin.render()
        gl.disable(moderngl.CULL_FACE)
        self._copy(self._backdrop, spread=0)
        gl.enable(moderngl.BLEND)
        self._paint.use(TEXTURE_UNIT)
        cap.render()
        if self._worn is not None:
            for lenses in self._worn.drawn[1:]:
                lenses.render()
        gl.disable(moderngl.DEPTH_TEST | moderngl.BLEND)
        self._result.use()
        self._copy(self._large, spread=SOFTNESS / self.size)
        data = self._result.read(components=3, alignment=1)
        pixels = np.frombuffer(data, np.uint8).reshape(self.size, self.size, 3)[::-1]
        face = self.face
        return Picture(pixels, face.lips_centre(pose.positions, self.size), face.lips_gap(pose.positions, self.size))

    def _upload(self, pose: Pose) -> list[Layer]:
        """Upload the meshes of a frame; return the layers that there are."""
        layers = []
        for layer, position, direction in (
            (self._head, pose.positions, pose.normals),
            (self._hair, pose.hair, pose.tangents),
            (self._worn, pose.worn, pose.worn_normals),
        ):
            if layer is not None:
                layer.moving.write(np.hstack([position, direction]).astype("f4").tobytes())
                layers.append(layer)
        return layers

    def _copy(self, source: Any, spread: float) -> None:
        """Fill the target with a texture. spread: distance of the four points that a pixel is the mean of."""
        source.use(TEXTURE_UNIT)
        self._programs["copy"]["spread"].value = spread
        self._whole.render()


def lamp_matrix(direction: Floats, middle: Floats) -> Floats:
    """Return the matrix (4, 4) from points to the shadow map of parallel light from a direction (3,)."""
    forward = -np.asarray(direction, float) / np.linalg.norm(direction)
    right = np.cross(forward, (0, 1, 0))
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(right, forward), forward]) / SHADOW_REACH
    matrix = np.eye(4)
    matrix[:3, :3] = axes
    matrix[:3, 3] = -axes @ middle
    return matrix
