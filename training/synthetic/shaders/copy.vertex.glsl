// One triangle that covers the whole picture, behind the head.
in vec2 corner;
out vec2 texel;

void main() {
    texel = corner * .5 + .5;
    gl_Position = vec4(corner, .9999, 1);
}
