in vec3 position, normal, rest;
in float part;
in vec2 uv;
uniform mat4 camera;
out vec3 point, outward, place;
out vec2 texel;
flat out int kind;

void main() {
    point = position;
    outward = normal;
    place = rest;
    texel = uv;
    kind = int(part + .5);
    gl_Position = camera * vec4(position, 1);
}
