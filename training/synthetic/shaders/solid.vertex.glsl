// An accessory.
in vec3 position, normal, rest;
in vec4 paint;
in float kind;
uniform mat4 camera;
out vec3 point, outward, place;
out vec4 painted;
flat out float matter;

void main() {
    point = position;
    outward = normal;
    place = rest;
    painted = paint;
    matter = kind;
    gl_Position = camera * vec4(position, 1);
}
