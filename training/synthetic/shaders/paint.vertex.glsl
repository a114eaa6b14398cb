// The skin, laid out as its texture.
in vec3 rest;
in vec4 mask;
in vec2 uv;
in float part;
out vec3 place;
out vec4 masks;

void main() {
    place = rest;
    masks = mask;
    gl_Position = part < .5 ? vec4(uv * 2. - 1., 0, 1) : vec4(2, 2, 2, 1);
}
